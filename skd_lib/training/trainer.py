"""One training loop for every method, on `transformers.Trainer`.

The methods differ in where a response comes from (`skd_lib.distillation.rollouts`) and in what is minimised
(`skd_lib.distillation.objectives`). Six things differ from the Trainer's own loop: the micro-batches of an optimiser
step are made together, from one rollout; the loss is a sum over response tokens divided by their number in the whole
step, over all micro-batches and processes; a step whose loss or gradient is broken leaves weights and optimiser as they
are; validation is the same loss on ground truth, weighted by tokens; each step logs what a person needs to see of the
method; and a checkpoint is copied to host memory and written while training goes on.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict, astuple
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from skd_lib._core.events import Progress
from skd_lib.config import TrainingConfig
from skd_lib.distillation.batch import Rollout
from skd_lib.distillation.loss import LossSums
from skd_lib.distillation.objectives import Objective
from skd_lib.distillation.rollouts import Strategy
from skd_lib.errors import SkdError
from skd_lib.models.modes import evaluating
from skd_lib.sampling.samples import SamplingStatistics
from skd_lib.training.cost import tokens_processed
from skd_lib.training.health import broken_step, response_trouble, skipped_steps
from skd_lib.training.modes import through_wrapper
from skd_lib.training.saving import Saver
from skd_lib.training.snapshots import SavingTrainer
from skd_lib.training.stream import TrainingStream
from skd_lib.training.timing import PhaseTimer
from skd_lib.training.traces import TraceRecorder

if TYPE_CHECKING:
    from skd_lib.data.tokenize import TokenizedExample

VALIDATION_LOSS = "validation_loss"
TRAINER_VALIDATION_LOSS = "eval_loss"
"""The Trainer's name for it, by which it finds the best checkpoint."""
TRACES = "traces"
"""Recorded sequences in the Trainer's history, which goes into every checkpoint: a resumed run has the earlier ones."""
log = logging.getLogger(__name__)


class OnMetrics(Protocol):
    """Receives the figures of an optimiser step; called on the main process only."""

    def __call__(self, step: int, figures: dict[str, float]) -> None:
        """Take the figures of `step`; step 0 is before training."""


class DistillationTrainer(SavingTrainer):
    """The training loop.

    Args:
        model: The student.
        args: The Trainer's arguments; one "epoch" of it is the whole stream.
        training: What makes a step a broken one, and how many may follow each other.
        objective: What is minimised.
        divergence: It is a divergence from the teacher, whose forward pass then counts.
        strategy: Makes the responses of an optimiser step.
        examples: Training examples.
        stream: Their order.
        validation: Ground-truth rollouts.
        name: What the errors and the progress call this training, e.g. "distill".
        recorder: Keeps a few sampled sequences in the history.
        saver: Writes checkpoints.
        on_metrics: See `OnMetrics`.
        callbacks: More callbacks for the Trainer.
    """

    def __init__(
        self,
        *,
        model: PreTrainedModel,
        args: TrainingArguments,
        training: TrainingConfig,
        objective: Objective,
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
            model=model,
            args=args,
            # The dataset is the stream's positions; what stands there is looked up when the rollout is made.
            train_dataset=range(args.max_steps * stream.batch_size),
            eval_dataset=validation,
            data_collator=torch.tensor,
            callbacks=[_OptimiserTime(self.timer), *callbacks],
            saver=saver,
        )
        self.remove_callback(PrinterCallback)
        self.loss_is_scaled_for_ga = True
        self._training, self._objective, self._strategy = training, objective, strategy
        self._divergence = divergence
        self._examples, self._stream, self._validation = examples, stream, validation
        self._name, self._recorder, self._on_metrics = name, recorder, on_metrics
        self._progress = Progress(name, args.max_steps)
        self._figures: dict[str, float] = {}
        self._response_tokens = 0
        # Sums over this process's tokens in this optimiser step.
        self._loss = torch.zeros((), device=args.device)
        self._entropies: dict[str, Tensor] = {}
        self._told_of_lengths = False

    def get_batch_samples(
        self, epoch_iterator: Iterator[Tensor], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Rollout]], Tensor]:
        """All micro-batches of one optimiser step, and the response tokens of the whole step over all processes."""
        micro_batches = [next(epoch_iterator).tolist() for _ in range(num_batches)]
        positions = [position for micro_batch in micro_batches for position in micro_batch]
        places = [self._stream.place(position) for position in positions]
        with self.timer("rollout"), self.accelerator.autocast(), self._gathered():
            rollout = self._strategy([self._examples[self._stream.example(position)] for position in positions], places)
            traces = self._recorder.record(rollout, places) if self.is_world_process_zero() else []
        if traces:
            self.state.log_history.append({"step": places[0].step + 1, TRACES: [asdict(trace) for trace in traces]})
        cost = tokens_processed(rollout, divergence=self._divergence)
        counts = [rollout.tokens, cost.student, cost.teacher, *astuple(rollout.statistics or SamplingStatistics())]
        tokens, student, teacher, *statistics = self._sum_over_processes(torch.tensor(counts, device=device)).tolist()
        self._response_tokens = max(tokens, 1)
        processed = {"response_tokens": tokens, "student_tokens": student, "teacher_tokens": teacher}
        self._figures = {**processed, **sampling_figures(SamplingStatistics(*statistics))}
        self._loss, self._entropies = torch.zeros((), device=device), {}
        inputs = [{"rollout": part} for part in rollout.split([len(rows) for rows in micro_batches])]
        return inputs, torch.tensor(self._response_tokens, device=device)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Forward and backward of one micro-batch."""
        with self.timer("loss"):
            loss: Tensor = super().training_step(*args, **kwargs)
        # The Trainer adds these up over steps: one broken step must not spoil the sum for ever.
        return torch.where(torch.isfinite(loss), loss, 0)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Rollout],
        return_outputs: bool = False,  # noqa: ARG002 - the base class's signature; only predictions need outputs
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """The micro-batch's share of the optimiser step's mean loss."""
        assert num_items_in_batch is not None  # noqa: S101 - `get_batch_samples` counts them
        sums = through_wrapper(model, self.model, self._loss_sums, inputs["rollout"])
        self._loss += sums.loss.detach()
        for name, entropy in sums.entropies.items():
            self._entropies[name] = self._entropies.get(name, torch.zeros_like(entropy)) + entropy
        # Data parallelism averages gradients over processes; the sum over all of them is wanted.
        processes: int = self.accelerator.num_processes
        return sums.loss / num_items_in_batch * processes

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> float:
        """The norm of the step's gradient, all of it there; a broken step's gradient is dropped, so nothing is updated.

        Raises:
            SkdError: too many steps in a row were broken.
        """
        norm = super()._get_grad_norm(model, grad_norm)
        norm = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
        # The same numbers on all processes, so all come to the same verdict.
        loss = self._sum_over_processes(self._loss).item() / self._response_tokens
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
        """Mean loss over the response tokens of the validation rollouts.

        Raises:
            SkdError: it is not a finite number.
        """
        sums = torch.zeros(2, dtype=torch.float64)
        with self.timer("validation"), evaluating(self.model), self._gathered():
            for rollout in self._validation[self.args.process_index :: self.args.world_size]:
                loss = self._loss_sums(rollout.to(self.args.device)).loss
                sums += torch.tensor([loss.item(), rollout.tokens], dtype=torch.float64)
        total, tokens = self._sum_over_processes(sums.to(self.args.device)).tolist()
        metrics = {TRAINER_VALIDATION_LOSS: total / max(tokens, 1)}
        if not torch.isfinite(torch.tensor(metrics[TRAINER_VALIDATION_LOSS])):
            raise SkdError(
                f"the validation loss is {total / max(tokens, 1)} after optimiser step {self.state.global_step}",
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
        """Complete the figures of a step or of a validation, keep them in the history and pass them on."""
        if TRAINER_VALIDATION_LOSS in logs:
            figures = {VALIDATION_LOSS: logs[TRAINER_VALIDATION_LOSS]}
        elif "loss" in logs:
            entropies = {
                f"{name}_entropy": self._sum_over_processes(entropy).item() / self._response_tokens
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
            self._look_at_lengths()
            shown = {name: figures[name] for name in ("loss", "rejection_rate") if name in figures}
            self._progress.update(self.state.global_step, **shown)
        if self._on_metrics is not None:
            self._on_metrics(self.state.global_step, figures)

    def _gathered(self) -> AbstractContextManager[None]:
        """What must be around forward passes of which processes make different numbers."""
        return nullcontext()

    def _look_at_lengths(self) -> None:
        if not self._told_of_lengths and (trouble := response_trouble(self.state.log_history)):
            self._told_of_lengths = True
            log.warning("%s: at optimiser step %d %s", self._name, self.state.global_step, trouble)

    def _loss_sums(self, rollout: Rollout) -> LossSums:
        with self.accelerator.autocast():
            return self._objective(self.model, rollout)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        with self.timer("checkpoint"):
            super()._save_checkpoint(*args, **kwargs)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        # A tied head is not in the file, and is not missing.
        missing = [key for key in load_result.missing_keys if key not in self.model.all_tied_weights_keys]
        super()._issue_warnings_after_load(load_result._replace(missing_keys=missing))

    def _sum_over_processes(self, values: Tensor) -> Tensor:
        total: Tensor = self.accelerator.reduce(values, "sum")
        return total


class _OptimiserTime(TrainerCallback):
    """Times the optimiser's step, which the Trainer calls itself."""

    def __init__(self, timer: PhaseTimer) -> None:
        self._timer = timer
        self._running = ExitStack()

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        """Gradients are clipped; the step comes next."""
        self._running.enter_context(self._timer("optimiser"))

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        """The step is done."""
        self._running.close()


def sampling_figures(statistics: SamplingStatistics) -> dict[str, float]:
    """What to log of a sampled batch: nothing for ground truth, no rates of tests that were not made."""
    if not statistics.sequences:
        return {}
    figures = {
        "truncated_fraction": statistics.truncated_fraction,
        "response_length_mean": statistics.tokens / statistics.sequences,
    }
    if statistics.tested:
        figures |= {
            "rejection_rate": statistics.rejection_rate,
            "acceptance_rate": statistics.acceptance_rate,
            "tokens_per_teacher_call": statistics.tokens_per_teacher_call,
            "replacements_per_sequence": statistics.replacements_per_sequence,
        }
    return figures
