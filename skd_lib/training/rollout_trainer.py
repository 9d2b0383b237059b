"""A `transformers.Trainer` of rollouts: the loss of an optimiser step, and sharding, for every training loop here.

The loss is a sum over response tokens divided by their number in the whole optimiser step, over all micro-batches and
processes.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, Trainer
from transformers.trainer import SCHEDULER_NAME

from skd_lib.distillation.batch import Rollout
from skd_lib.distillation.loss import LossSums, Objective
from skd_lib.models.modes import evaluating
from skd_lib.training.figures import ratio_error, ratio_sums
from skd_lib.training.sharding import Sharded, gathered, load_states, load_weights, through_wrapper


class RolloutTrainer(Trainer):
    """Trains on micro-batches `{"rollout": Rollout}`, of which `get_batch_samples` makes those of a step together.

    Student and frozen teacher may be `sharded` over the processes, see `skd_lib.training.sharding`.
    """

    def __init__(self, *, objective: Objective, teacher: PreTrainedModel | None, sharded: bool, **options: Any) -> None:
        self.objective, self.teacher, self.sharded = objective, teacher, sharded
        super().__init__(**options)
        self.loss_is_scaled_for_ga = True  # `compute_loss` divides by the tokens of the whole optimiser step

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Rollout],
        return_outputs: bool = False,  # noqa: ARG002 - the base class's signature; only predictions need outputs
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Return the micro-batch's share of the optimiser step's mean loss."""
        assert num_items_in_batch is not None  # noqa: S101 - `get_batch_samples` counts them
        sums = through_wrapper(model, self.model, self._loss_sums, inputs["rollout"])
        self.took(sums)
        # Data parallelism averages gradients over processes, where their sum is needed.
        processes: int = self.accelerator.num_processes
        return sums.loss / num_items_in_batch * processes

    def took(self, sums: LossSums) -> None:
        """Receive the sums of each micro-batch."""

    @torch.no_grad()
    def mean_loss(self, rollouts: Iterable[Rollout]) -> tuple[float, float | None]:
        """Compute the mean loss over the response tokens of all processes' rollouts, and its error over the rows."""
        sums = torch.zeros(8, dtype=torch.float64)
        with evaluating(self.model), self.gathered():
            for rollout in rollouts:
                found = self._loss_sums(rollout.to(self.args.device))
                of_rows = torch.stack([part.sum() for part in torch.split(found.losses_N, rollout.lengths)])
                whole = torch.tensor([found.loss.item(), rollout.tokens], dtype=torch.float64)
                sums += torch.cat([whole, ratio_sums(of_rows, torch.tensor(rollout.lengths))])
        total, tokens, *rows = self.sum_over_processes(sums.to(self.args.device)).tolist()
        return total / max(tokens, 1), ratio_error(rows)

    def gathered(self) -> AbstractContextManager[None]:
        """Surround forward passes whose number differs between processes; sharded models need it."""
        return gathered(self.model, self.teacher) if self.sharded else nullcontext()

    def sum_over_processes(self, values: Tensor) -> Tensor:
        """Return the sum of each process's values."""
        total: Tensor = self.accelerator.reduce(values, "sum")
        return total

    @property
    def plain_optimizer(self) -> torch.optim.Optimizer:
        """The optimiser without accelerate's wrapper."""
        return cast(torch.optim.Optimizer, getattr(self.optimizer, "optimizer", self.optimizer))

    def _loss_sums(self, rollout: Rollout) -> LossSums:
        with self.accelerator.autocast():
            return self.objective(self.model, rollout)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> float:
        norm = super()._get_grad_norm(model, grad_norm)
        return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)

    def _wrap_model(self, model: nn.Module, *args: Any, **options: Any) -> nn.Module:
        if not self.sharded:
            return cast(nn.Module, super()._wrap_model(model, *args, **options))
        # accelerate would replicate an unwrapped model (DistributedDataParallel).
        return model if isinstance(model, Sharded) else Sharded(model)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.sharded:
            load_weights(model or self.model, Path(resume_from_checkpoint))
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        # A tied head is not in the file, and is not missing.
        missing = [key for key in load_result.missing_keys if key not in self.model.all_tied_weights_keys]
        super()._issue_warnings_after_load(load_result._replace(missing_keys=missing))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if not self.sharded:
            super()._load_optimizer_and_scheduler(checkpoint)
        elif checkpoint is not None:
            load_states(self.model, self.plain_optimizer, Path(checkpoint))
            self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True))
