"""SIGTERM, by which a machine says that it is about to go: finish the optimiser step, save, and stop.

`transformers` has a callback for the same purpose (`enable_jit_checkpoint`). It is not used: it saves in the middle of
an optimiser step, when the random numbers of that step are spent, so that a resumed run is another one; it stops each
process by its own clock, so that processes that train together wait for each other for ever; and the training then
ends as if it had been finished.
"""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from skd_lib.errors import Preempted

log = logging.getLogger(__name__)


class StopOnSigterm(TrainerCallback):
    """Saves a checkpoint at the end of the optimiser step in which SIGTERM came, and raises `Preempted`.

    It must come after the callback that completes checkpoints. Of several processes one that gets the signal is
    enough: they decide together, after each step.
    """

    def __init__(self) -> None:
        self._received = False
        self._stopping = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take SIGTERM inside, in place of the process's own way; further ones change nothing.

        Python gives signals to the main thread alone: elsewhere nothing is taken.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGTERM, self._take)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **_: Any,
    ) -> None:
        """The weights have been updated; a checkpoint made now is between two steps."""
        self._stopping = self._received
        if PartialState().num_processes > 1:
            received = reduce(torch.tensor(float(self._received), device=args.device), "sum")
            self._stopping = bool(received.item())
        if self._stopping:
            log.warning("SIGTERM: saving a checkpoint of optimiser step %d", state.global_step)
            control.should_save = True
            control.should_training_stop = True

    def on_save(
        self,
        args: TrainingArguments,  # noqa: ARG002
        state: TrainerState,
        control: TrainerControl,  # noqa: ARG002
        **_: Any,
    ) -> None:
        """The checkpoint is complete.

        Raises:
            Preempted: this was what SIGTERM left to do.
        """
        if self._stopping:
            raise Preempted(
                f"stopped by SIGTERM after optimiser step {state.global_step}, which is saved",
                hint="start it again with the same settings: it goes on from there",
            )

    def _take(self, _number: int, _frame: FrameType | None) -> None:
        self._received = True
