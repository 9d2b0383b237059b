"""A Trainer whose checkpoints are copied to host memory between two steps, and written while training goes on."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate.utils import gather_object, recursively_apply
from torch import Tensor
from transformers import Trainer
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from skd_lib._core.machine import free_memory
from skd_lib.training.saving import Saver

_RESERVE = 2**30
"""Bytes of memory that a copy leaves free."""
_States = TypeVar("_States")
log = logging.getLogger(__name__)


class SavingTrainer(Trainer):
    """`transformers.Trainer`, but for who writes a checkpoint and when; the files are the same.

    The small files are written at once. Of the large ones, weights and the optimiser's states, copies are taken, and
    the saver's thread writes them. Where host memory has no room for copies, training waits.

    Args:
        saver: Writes checkpoints.
        **options: See `transformers.Trainer`.
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
        """Let the main process write the files of all: others may be on machines whose checkpoints nobody keeps."""
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
        """Copy the weights that belong in a checkpoint: frozen ones are not in it, and tied ones once."""
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
        """Copy the optimiser's states."""
        return self._copy(self.optimizer.state_dict()) if self.args.should_save else {}

    def _copy(self, states: _States) -> _States:
        if not self._copied:
            return states
        copied: _States = recursively_apply(lambda tensor: tensor.detach().to("cpu", copy=True), states)
        return copied


def _fits(*states: Any) -> bool:
    sizes: list[int] = []

    def count(tensor: Tensor) -> Tensor:
        sizes.append(tensor.nbytes)
        return tensor

    recursively_apply(count, states)
    return sum(sizes) + _RESERVE <= free_memory()
