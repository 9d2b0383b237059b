"""Preemption: on SIGTERM, finish the optimiser step, save a checkpoint, and stop.

`skd run`, torchrun and a node of a TrainJob have their grace period for it. A step of Kubeflow Pipelines has about a
second, enough for a small model only; there the checkpoints by time count (`training.checkpoint_minutes`).

`transformers` has a callback for the same purpose (`enable_jit_checkpoint`). It is not used: it saves in the middle of
an optimiser step, whose random numbers are spent, so that a resumed run differs; each process stops by its own clock,
so that processes that train together deadlock; and the training then ends as if it had been finished.
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

    Processes decide together after each step: a signal to one of them stops all.
    """

    def __init__(self, saver: Saver) -> None:
        self._saver = saver
        self._received = False
        self._stopping = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle SIGTERM inside, where a second one changes nothing; only in the main thread, as Python demands."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGTERM, self._take)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def on_step_end(self, args: TrainingArguments, _state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Ask for a checkpoint and for the end, between two steps."""
        self._stopping = on_any_process(self._received, args.device)
        if self._stopping:
            control.should_save = True
            control.should_training_stop = True

    def on_save(self, _args: TrainingArguments, state: TrainerState, *_: Any, **__: Any) -> None:
        """Wait for the checkpoint, after SIGTERM.

        Raises:
            Preempted: the checkpoint is complete.
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
