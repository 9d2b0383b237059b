"""When checkpoints are made, and the thread that writes them."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from skd_lib.training.checkpoints import Attempt, checkpoint_path

log = logging.getLogger(__name__)


class Saver:
    """Writes the checkpoints of an attempt, one at a time; used by the main process.

    Used as a context it ends when the last one is written. An error of the thread is raised by the next call of
    `check`, `wait` or `begin`.

    Args:
        attempt: Whose checkpoints.
        keep: How many of the newest are kept, besides the best.
        minutes: Between two of them.

    Attributes:
        place: Where the last complete one is; empty: there is none yet.
    """

    def __init__(self, attempt: Attempt, keep: int, minutes: float) -> None:
        self.place = ""
        self._attempt, self._keep, self._seconds = attempt, keep, 60 * minutes
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="skd-checkpoint")
        self._writing: Future[str] | None = None
        self._last = time.monotonic()

    def __enter__(self) -> Saver:
        """Start the clock."""
        self._last = time.monotonic()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Let the last one be written; its error is raised, or logged where another one is on its way."""
        try:
            self.wait()
        except Exception as trouble:
            if error is None:
                raise
            log.error("the last checkpoint is not complete: %s", trouble)
        finally:
            self._pool.shutdown()

    @property
    def due(self) -> bool:
        """Whether it is time for the next one; not before the one before is written."""
        return self._writing is None and time.monotonic() - self._last >= self._seconds

    def check(self) -> None:
        """See how the one that is being written comes along.

        Raises:
            Exception: it could not be written.
        """
        if self._writing is not None and self._writing.done():
            self.wait()

    def wait(self) -> None:
        """Wait for the one that is being written.

        Raises:
            Exception: it could not be written.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            self.place = writing.result()

    def begin(self, step: int) -> None:
        """Make the folder for the checkpoint of a step, once the one before is written.

        Raises:
            Exception: the one before could not be written.
        """
        self.wait()
        self._last = time.monotonic()
        self._attempt.begin(step)

    def write(self, step: int, best_step: int, files: Sequence[Callable[[], Any]], *, background: bool) -> None:
        """Write the files that are missing in a checkpoint, and declare it complete.

        Args:
            step: The checkpoint's optimiser step.
            best_step: That of the checkpoint with the lowest validation loss; 0: there is none yet.
            files: Each writes one or more of its files.
            background: Whether training goes on meanwhile.
        """

        def work() -> str:
            for file in files:
                file()
            return self._attempt.commit(step, best_step, self._keep)

        self._writing = self._pool.submit(work)
        if not background:
            self.wait()


class TimedCheckpoints(TrainerCallback):
    """Asks for a checkpoint when it is time; of several processes the main one's clock decides for all.

    Args:
        saver: Writes them.
        folder: The attempt's folder.
    """

    def __init__(self, saver: Saver, folder: Path) -> None:
        self._saver, self._folder = saver, folder

    def on_train_begin(
        self,
        args: TrainingArguments,  # noqa: ARG002
        state: TrainerState,
        control: TrainerControl,  # noqa: ARG002
        **_: Any,
    ) -> None:
        """After a resume: the best checkpoint was written by another attempt, maybe on another machine."""
        self._name_best(state)

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **_: Any,
    ) -> None:
        """The weights have been updated; a checkpoint made now is between two steps.

        Raises:
            Exception: an earlier one could not be written.
        """
        due = False
        if state.is_world_process_zero:
            self._saver.check()
            due = self._saver.due
        if on_any_process(due, args.device):
            control.should_save = True

    def on_save(
        self,
        args: TrainingArguments,  # noqa: ARG002
        state: TrainerState,
        control: TrainerControl,  # noqa: ARG002
        **_: Any,
    ) -> None:
        """Called by the trainer after each checkpoint."""
        self._name_best(state)

    def _name_best(self, state: TrainerState) -> None:
        """On every process: the Trainer names it only where it sees the folder, and all must load it together."""
        if state.best_global_step:
            state.best_model_checkpoint = str(checkpoint_path(self._folder, state.best_global_step))


def on_any_process(here: bool, device: torch.device) -> bool:
    """Whether something is the case on one process at least; all call this together, and get the same answer."""
    if PartialState().num_processes == 1:
        return here
    return bool(reduce(torch.tensor(float(here), device=device), "sum").item())
