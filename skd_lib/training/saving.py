"""Checkpoints written while training goes on: their times, SIGTERM among them, their copies, and the writing thread."""

from __future__ import annotations

import logging
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import gather_object, recursively_apply, reduce
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from skd_lib._core.machine import free_memory
from skd_lib.errors import Preempted
from skd_lib.training.checkpoints import Attempt, checkpoint_path

_RESERVE = 2**30
"""Bytes of memory that a copy leaves free."""
_States = TypeVar("_States")
log = logging.getLogger(__name__)


class Saver:
    """Writes the checkpoints of an attempt, one at a time; used by the main process. It keeps `keep` and the best one.

    As a context it ends when the last one is written. An error of the thread is raised by the next call of `check`,
    `wait` or `begin`.
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
        """Wait for the last checkpoint; its error is raised, or logged if another error ends the training."""
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
        """Tell if the next checkpoint is due; never while one is being written."""
        return self._writing is None and time.monotonic() - self._last >= self._seconds

    def check(self) -> None:
        """Raise the error of a checkpoint whose writing has ended by one."""
        if self._writing is not None and self._writing.done():
            self.wait()

    def wait(self) -> None:
        """Wait for the checkpoint that is being written, and raise its error."""
        writing, self._writing = self._writing, None
        if writing is not None:
            self.place = writing.result()

    def begin(self, step: int) -> None:
        """Make the folder for a step's checkpoint, after `wait` for the one before."""
        self.wait()
        self._last = time.monotonic()
        self._attempt.begin(step)

    def write(self, step: int, best_step: int, files: Sequence[Callable[[], Any]], *, background: bool) -> None:
        """Write the files that a checkpoint still lacks, declare it complete (see `Attempt.commit`).

        In the background this returns at once, so that training goes on.
        """

        def work() -> str:
            for file in files:
                file()
            return self._attempt.commit(step, best_step, self._keep)

        self._writing = self._pool.submit(work)
        if not background:
            self.wait()


class SavingTrainer(Trainer):
    """A `transformers.Trainer` whose checkpoints are copied to host memory between two steps; the files are the same.

    The small files are written at once. Weights and optimiser states are copied, and the saver's thread writes the
    copies. If host memory has no room for copies, training waits.
    """

    def __init__(self, *, saver: Saver, **options: Any) -> None:
        super().__init__(**options)
        self._saver = saver
        self._files: list[Callable[[], Any]] = []
        self._copied = True

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Take the weights for a checkpoint, to be written later; called by all processes."""
        weights = self._trained_weights()
        if self.args.should_save:
            self._files.append(partial(self._save, output_dir, state_dict=weights))

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        step = self.state.global_step
        if self.args.should_save:
            self._saver.begin(step)
        super()._save_checkpoint(*args, **kwargs)
        files, self._files = self._files, []
        if self.args.should_save:
            self._saver.write(step, self.state.best_global_step or 0, files, background=self._copied)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        states = self._optimizer_states()
        if self.args.should_save:
            self._files.append(partial(torch.save, states, Path(output_dir) / OPTIMIZER_NAME))
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _save_rng_state(self, output_dir: str) -> None:
        """Let the main process write all processes' files: checkpoints on other machines may be lost with them."""
        with tempfile.TemporaryDirectory() as own:
            super()._save_rng_state(own)
            files = {file.name: file.read_bytes() for file in Path(own).iterdir()}
        for each in gather_object([files]):
            for name, content in each.items():
                if self.args.should_save:
                    (Path(output_dir) / name).write_bytes(content)

    def _load_best_model(self) -> None:
        if self.args.should_save:
            self._saver.wait()
        self.accelerator.wait_for_everyone()
        self._load_weights_of_best()

    def _load_weights_of_best(self) -> None:
        super()._load_best_model()

    def _trained_weights(self) -> dict[str, Tensor]:
        """Copy the weights that belong in a checkpoint: no frozen ones, and tied ones once."""
        if not self.args.should_save:
            return {}
        left_out = {name for name, weight in self.model.named_parameters() if not weight.requires_grad}
        left_out |= set(self.model.all_tied_weights_keys)
        weights = {name: weight for name, weight in self.model.state_dict().items() if name not in left_out}
        before, self._copied = self._copied, _fits(weights, self.optimizer.state_dict())
        if before and not self._copied:
            log.warning("training waits while checkpoints are written: host memory has no room for a copy")
        return self._copy(weights)

    def _optimizer_states(self) -> Any:
        return self._copy(self.optimizer.state_dict()) if self.args.should_save else {}

    def _copy(self, states: _States) -> _States:
        if not self._copied:
            return states
        copied: _States = recursively_apply(lambda tensor: tensor.detach().to("cpu", copy=True), states)
        return copied


class TimedCheckpoints(TrainerCallback):
    """Asks for a checkpoint when one is due; of several processes the main one's clock decides for all."""

    def __init__(self, saver: Saver, folder: Path) -> None:
        self._saver, self._folder = saver, folder

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Ask for a checkpoint between two steps, after raising the error of an earlier one."""
        due = False
        if state.is_world_process_zero:
            self._saver.check()
            due = self._saver.due
        if on_any_process(due, args.device):
            control.should_save = True

    def on_save(self, _args: TrainingArguments, state: TrainerState, *_: Any, **__: Any) -> None:
        """Name the best checkpoint on every process, after each new one and after a resume.

        The Trainer does so only where it sees the folder, and all load it together.
        """
        if state.best_global_step:
            state.best_model_checkpoint = str(checkpoint_path(self._folder, state.best_global_step))

    on_train_begin = on_save


class StopOnSigterm(TrainerCallback):
    """Saves a checkpoint at the end of the optimiser step in which SIGTERM came, and raises `Preempted`.

    Processes decide together after each step: a signal to one of them stops all. `skd run`, torchrun and a node of a
    TrainJob have a grace period for it. A step of Kubeflow Pipelines has about a second, enough for a small model only;
    there the checkpoints by time count (`training.checkpoint_minutes`).

    `transformers` has a callback for the same purpose (`enable_jit_checkpoint`). It is not used: it saves in the middle
    of an optimiser step, whose random numbers are spent, so that a resumed run differs; each process stops by its own
    clock, so that processes that train together deadlock; and the training then ends as if it had been finished.
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


def on_any_process(here: bool, device: torch.device) -> bool:
    """Return True if `here` is true on one process at least; all processes call this together."""
    if PartialState().num_processes == 1:
        return here
    return bool(reduce(torch.tensor(float(here), device=device), "sum").item())


def _fits(*states: Any) -> bool:
    sizes: list[int] = []

    def count(tensor: Tensor) -> Tensor:
        sizes.append(tensor.nbytes)
        return tensor

    recursively_apply(count, states)
    return sum(sizes) + _RESERVE <= free_memory()
