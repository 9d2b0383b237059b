"""One training loop for every method, on `transformers.Trainer`.

The methods differ in the source of responses (`skd_lib.distillation.rollouts`) and in the objective
(`skd_lib.distillation.loss`). Six things differ from the Trainer's own loop: the micro-batches of an optimiser
step are made together, from one rollout; the loss is a sum over response tokens divided by their number in the whole
step, over all micro-batches and processes; a step with a broken loss or gradient changes no weights and no optimiser
states; validation is the same loss on ground truth, weighted by tokens; each step logs the method's figures; and a
checkpoint is copied to host memory and written while training goes on.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, astuple
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from skd_lib._core.events import Progress
from skd_lib._core.seeds import generator
from skd_lib.config import TrainingConfig
from skd_lib.distillation.batch import Rollout
from skd_lib.distillation.loss import LossSums, Objective
from skd_lib.distillation.rollouts import RowKey, Strategy
from skd_lib.errors import SkdError
from skd_lib.models.modes import casting_once
from skd_lib.sampling.samples import SamplingStatistics
from skd_lib.training.figures import (
    PhaseTimer,
    broken_step,
    response_trouble,
    sampling_figures,
    skipped_steps,
    tokens_processed,
)
from skd_lib.training.rollout_trainer import RolloutTrainer
from skd_lib.training.saving import Saver, SavingTrainer
from skd_lib.training.sharding import whole_states, whole_weights
from skd_lib.training.traces import TraceRecorder

if TYPE_CHECKING:
    from skd_lib.data.tokenize import TokenizedExample

VALIDATION_LOSS = "validation_loss"
TRAINER_VALIDATION_LOSS = "eval_loss"
"""The Trainer's name for the validation loss, by which it finds the best checkpoint."""
VALIDATION_ERROR = "validation_loss_error"
"""Key of the validation loss's standard error over examples in the Trainer's history."""
TRACES = "traces"
"""Key of the recorded sequences in the Trainer's history, which every checkpoint holds."""
T = TypeVar("T")
log = logging.getLogger(__name__)


OnMetrics = Callable[[int, dict[str, float]], None]
"""Receives an optimiser step and its figures, on the main process only; step 0 is before training."""


class TrainingStream:
    """An endless stream of examples in seeded order: shuffled epoch after shuffled epoch, with no short batches.

    A position in the stream decides its example, its optimiser step (of `batch_size` rows, over all processes) and its
    row. So a step has the same rows and seeds however it is divided into micro-batches and processes, and a resumed
    run goes on exactly where it stopped.
    """

    def __init__(self, examples: int, batch_size: int, seed: int) -> None:
        self.examples, self.batch_size, self.seed = examples, batch_size, seed
        self._order = lru_cache(maxsize=2)(self._shuffled)

    def example(self, position: int) -> int:
        """Return the index of the example at a position."""
        epoch, offset = divmod(position, self.examples)
        return self._order(epoch)[offset]

    def place(self, position: int) -> RowKey:
        """Return the optimiser step and the row of a position."""
        return RowKey(*divmod(position, self.batch_size))

    def _shuffled(self, epoch: int) -> list[int]:
        order: list[int] = generator("order", self.seed, epoch).permutation(self.examples).tolist()
        return order


class DistillationTrainer(RolloutTrainer, SavingTrainer):
    """The training loop; one "epoch" of the Trainer is the whole stream of the examples' positions.

    Checkpoints of a sharded student hold whole weights and optimiser states all the same, so that another number of
    processes can go on from them. With `divergence` the loss is one from the teacher, whose forward pass then counts.
    """

    def __init__(
        self,
        *,
        model: PreTrainedModel,
        args: TrainingArguments,
        training: TrainingConfig,
        objective: Objective,
        teacher: PreTrainedModel | None = None,
        sharded: bool = False,
        divergence: bool,
        strategy: Strategy,
        examples: Sequence[TokenizedExample],
        stream: TrainingStream,
        validation: Sequence[Rollout],
        name: str,
        recorder: TraceRecorder,
        saver: Saver,
        on_metrics: OnMetrics | None = None,
        callbacks: Sequence[TrainerCallback] = (),
    ) -> None:
        self.timer = PhaseTimer(args.device)
        super().__init__(
            objective=objective,
            teacher=teacher,
            sharded=sharded,
            model=model,
            args=args,
            # The dataset is the stream's positions; their examples are looked up when the rollout is made.
            train_dataset=range(args.max_steps * stream.batch_size),
            eval_dataset=validation,
            data_collator=torch.tensor,
            callbacks=[_OptimiserTime(self.timer), *callbacks],
            saver=saver,
        )
        self.remove_callback(PrinterCallback)
        self._training, self._strategy = training, strategy
        self._divergence = divergence
        self._examples, self._stream, self._validation = examples, stream, validation
        self._name, self._recorder, self._on_metrics = name, recorder, on_metrics
        self._progress = Progress(name, args.max_steps)
        self._figures: dict[str, float] = {}
        self._response_tokens = 0
        # Sums over this process's tokens in the current optimiser step.
        self._loss = torch.zeros((), device=args.device)
        self._entropies: dict[str, Tensor] = {}
        self._warned_of_lengths = False

    def get_batch_samples(
        self, epoch_iterator: Iterator[Tensor], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Rollout]], Tensor]:
        """Return the micro-batches of one optimiser step, and the step's response tokens over all processes."""
        micro_batches = [next(epoch_iterator).tolist() for _ in range(num_batches)]
        positions = [position for micro_batch in micro_batches for position in micro_batch]
        places = [self._stream.place(position) for position in positions]
        with self.timer("rollout"), self.accelerator.autocast(), self.gathered(), casting_once(self.model):
            rollout = self._strategy([self._examples[self._stream.example(position)] for position in positions], places)
            traces = self._recorder.record(rollout, places) if self.is_world_process_zero() else []
        if traces:
            self.state.log_history.append({"step": places[0].step + 1, TRACES: [asdict(trace) for trace in traces]})
        cost = tokens_processed(rollout, divergence=self._divergence)
        counts = [rollout.tokens, cost.student, cost.teacher, *astuple(rollout.statistics or SamplingStatistics())]
        tokens, student, teacher, *statistics = self.sum_over_processes(torch.tensor(counts, device=device)).tolist()
        self._response_tokens = max(tokens, 1)
        processed = {"response_tokens": tokens, "student_tokens": student, "teacher_tokens": teacher}
        self._figures = {**processed, **sampling_figures(SamplingStatistics(*statistics))}
        self._loss, self._entropies = torch.zeros((), device=device), {}
        inputs = [{"rollout": part} for part in rollout.split([len(rows) for rows in micro_batches])]
        return inputs, torch.tensor(self._response_tokens, device=device)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Run forward and backward of one micro-batch."""
        with self.timer("loss"):
            loss: Tensor = super().training_step(*args, **kwargs)
        # The Trainer adds these up over steps: one broken step must not spoil the sum.
        return torch.where(torch.isfinite(loss), loss, 0)

    def took(self, sums: LossSums) -> None:
        """Add up the loss and the entropies of the optimiser step."""
        self._loss += sums.loss.detach()
        for name, entropy in sums.entropies.items():
            self._entropies[name] = self._entropies.get(name, torch.zeros_like(entropy)) + entropy

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> float:
        """Return the norm of the step's whole gradient, after dropping the gradient of a broken step."""
        norm = super()._get_grad_norm(model, grad_norm)
        # The same numbers on all processes, so all decide alike.
        loss = self.sum_over_processes(self._loss).item() / self._response_tokens
        history = self.state.log_history
        skipped, in_a_row = skipped_steps(history)
        problem = broken_step(loss, norm, history, self._training.explosion_factor)
        if problem:
            skipped, in_a_row = skipped + 1, in_a_row + 1
            log.warning("%s: optimiser step %d is skipped: %s", self._name, self.state.global_step + 1, problem)
            model.zero_grad()
        if in_a_row >= self._training.max_skipped_steps:
            raise SkdError(
                f"{in_a_row} optimiser steps in a row were skipped, up to step {self.state.global_step + 1}: {problem}",
                where=self._name,
                hint="lower training.learning_rate or raise training.warmup_ratio, then run again; the last good "
                f"checkpoint is kept in {self.args.output_dir}",
            )
        self._figures |= {"loss": loss, "skipped_steps": skipped}
        return norm

    @torch.no_grad()
    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Compute the mean loss over the response tokens of the validation rollouts, and its error over the rows."""
        with self.timer("validation"):
            mean, error = self.mean_loss(self._validation[self.args.process_index :: self.args.world_size])
        metrics = {TRAINER_VALIDATION_LOSS: mean}
        if error is not None:
            metrics[VALIDATION_ERROR] = error
        if not math.isfinite(mean):
            raise SkdError(
                f"the validation loss is {mean} after optimiser step {self.state.global_step}",
                where=self._name,
                hint="lower training.learning_rate, then run again"
                if self.state.global_step
                else "nothing has been trained yet, so the model itself computes such numbers on this data: "
                "check the model's files, and try training.precision fp32",
            )
        self.log(metrics)
        self.control: TrainerControl = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Complete the figures of a step or of a validation, add them to the history and call `on_metrics`."""
        if TRAINER_VALIDATION_LOSS in logs:
            figures = {VALIDATION_LOSS: logs[TRAINER_VALIDATION_LOSS]}
        elif "loss" in logs:
            entropies = {
                f"{name}_entropy": self.sum_over_processes(entropy).item() / self._response_tokens
                for name, entropy in self._entropies.items()
            }
            figures = {**logs, **self._figures, **entropies}
        else:  # the Trainer's closing summary
            super().log(logs, start_time)
            return
        figures |= self.timer.take()
        super().log(logs | figures, start_time)
        if not self.is_world_process_zero():
            return
        if "loss" in figures:
            self._warn_of_lengths()
            shown = {name: figures[name] for name in ("loss", "rejection_rate") if name in figures}
            self._progress.update(self.state.global_step, **shown)
        if self._on_metrics is not None:
            self._on_metrics(self.state.global_step, figures)

    def _warn_of_lengths(self) -> None:
        if not self._warned_of_lengths and (trouble := response_trouble(self.state.log_history)):
            self._warned_of_lengths = True
            log.warning("%s: at optimiser step %d %s", self._name, self.state.global_step, trouble)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        with self.timer("checkpoint"):
            super()._save_checkpoint(*args, **kwargs)

    def _trained_weights(self) -> dict[str, Tensor]:
        return whole_weights(self.model) if self.sharded else super()._trained_weights()

    def _optimizer_states(self) -> Any:
        return whole_states(self.model, self.plain_optimizer) if self.sharded else super()._optimizer_states()

    def _load_weights_of_best(self) -> None:
        if self.sharded:
            self._load_from_checkpoint(self.state.best_model_checkpoint)
        else:
            super()._load_weights_of_best()


class _OptimiserTime(TrainerCallback):
    """Times the optimiser's step, which the Trainer calls itself."""

    def __init__(self, timer: PhaseTimer) -> None:
        self._timer = timer
        self._running = ExitStack()

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        """Start the clock."""
        self._running.enter_context(self._timer("optimiser"))

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        """Stop the clock."""
        self._running.close()
