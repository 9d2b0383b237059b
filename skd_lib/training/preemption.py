"""SIGTERM, by which a machine says that it is about to go: finish the optimiser step, save, and stop.

How much time there is depends on who sends it. `skd run`, torchrun and a node of a TrainJob get their grace period. A
step of Kubeflow Pipelines has a second: Argo's executor, the container's first process, ends at its next poll and the
kernel ends the rest, so that nothing but a small model is saved. What counts there are the checkpoints by time
(`training.checkpoint_minutes`). So nothing is said before it is done: by then nobody may be listening.

`transformers` has a callback for the same purpose (`enable_jit_checkpoint`). It is not used: it saves in the middle of
an optimiser step, when the random numbers of that step are spent, so that a resumed run is another one; it stops each
process by its own clock, so that processes that train together wait for each other for ever; and the training then
ends as if it had been finished.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from accelerate import PartialState
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from skd_lib.errors import Preempted
from skd_lib.training.saving import Saver, on_any_process


class StopOnSigterm(TrainerCallback):
    """Saves a checkpoint at the end of the optimiser step in which SIGTERM came, and raises `Preempted`.

    Of several processes one that gets the signal is enough: they decide together, after each step.

    Args:
        saver: Writes checkpoints.
    """

    def __init__(self, saver: Saver) -> None:
        self._saver = saver
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
        state: TrainerState,  # noqa: ARG002
        control: TrainerControl,
        **_: Any,
    ) -> None:
        """The weights have been updated; a checkpoint made now is between two steps."""
        self._stopping = on_any_process(self._received, args.device)
        if self._stopping:
            control.should_save = True
            control.should_training_stop = True

    def on_save(
        self,
        args: TrainingArguments,  # noqa: ARG002
        state: TrainerState,
        control: TrainerControl,  # noqa: ARG002
        **_: Any,
    ) -> None:
        """The checkpoint is being written: wait for it.

        Raises:
            Preempted: it is complete, which was what SIGTERM left to do.
            Exception: it could not be written.
        """
        if not self._stopping:
            return
        self._saver.wait()
        PartialState().wait_for_everyone()  # a process that ends first would take the writing one with it
        raise Preempted(
            f"stopped by SIGTERM after optimiser step {state.global_step}; its checkpoint is {self._saver.place}",
            hint="start it again with the same settings: it goes on from there",
        )

    def _take(self, _number: int, _frame: FrameType | None) -> None:
        self._received = True
