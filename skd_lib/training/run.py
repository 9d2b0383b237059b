"""One training run, `train`: from models and examples to the best weights, resumable at any moment."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import torch
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments

from skd_lib.config import DistillConfig, MethodName, TrainingConfig
from skd_lib.distillation.batch import Rollout, collate, teacher_signals
from skd_lib.distillation.loss import objective_for
from skd_lib.distillation.methods import METHODS
from skd_lib.distillation.rollouts import SamplerAt, Strategy, rollout_for
from skd_lib.distillation.teacher_signal import TeacherSignal
from skd_lib.errors import SkdError
from skd_lib.models.adapters import add_lora, merge_lora
from skd_lib.models.heads import check_supported, common_vocabulary
from skd_lib.models.modes import attention_dropout, evaluating
from skd_lib.models.precision import Resolved, resolve_precision
from skd_lib.training.checkpoints import Checkpoints
from skd_lib.training.figures import PEAK_BYTES, SECONDS
from skd_lib.training.plan import plan_steps
from skd_lib.training.saving import Saver, StopOnSigterm, TimedCheckpoints
from skd_lib.training.sharding import check_processes, place_teacher, shard, whole_model
from skd_lib.training.traces import Trace, TraceRecorder, recorded_steps
from skd_lib.training.trainer import (
    TRACES,
    TRAINER_VALIDATION_LOSS,
    VALIDATION_LOSS,
    DistillationTrainer,
    OnMetrics,
    TrainingStream,
)

if TYPE_CHECKING:
    from skd_lib.data.tokenize import TokenizedExample

_VALIDATION_STATES_BYTES = 2**30
"""Most host memory for the teacher's states on the validation set, which are kept between validations if they fit."""
_CPU = torch.device("cpu")
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainResult:
    """The result of a training run: the student with the weights of the best checkpoint, in one piece.

    The history has the logged figures, each with its `step`, including those from before a resume; seconds are of each
    phase over the whole run; peak memory is of each phase on this process's GPU, empty without one.
    """

    student: PreTrainedModel
    precision: Resolved
    steps: int
    best_step: int
    best_validation_loss: float
    first_validation_loss: float
    history: list[dict[str, float]]
    seconds: dict[str, float]
    peak_bytes: dict[str, int]
    traces: list[Trace]

    def course(self, figure: str) -> tuple[float, float] | None:
        """Average a figure over the first and over the last tenth of the steps that logged it; None if none did."""
        values = [entry[figure] for entry in self.history if figure in entry]
        if not values:
            return None
        tenth = math.ceil(len(values) / 10)
        return sum(values[:tenth]) / tenth, sum(values[-tenth:]) / tenth

    def total(self, figure: str) -> float:
        """Sum a figure over all steps."""
        return sum(entry.get(figure, 0.0) for entry in self.history)


class GivenSignals(Protocol):
    """The teacher's signals from elsewhere: stored ones, or a server's."""

    def along(self, example: TokenizedExample) -> TeacherSignal:
        """Return the signal along one example's response."""
        ...

    def attached(self, strategy: Strategy, device: torch.device) -> Strategy:
        """Add the signals to the rollouts of a strategy that have none."""
        ...


def train(
    *,
    method: MethodName,
    student: PreTrainedModel,
    teacher: PreTrainedModel | None,
    train: Sequence[TokenizedExample],
    validation: Sequence[TokenizedExample],
    training: TrainingConfig,
    distill: DistillConfig | None = None,
    signals: GivenSignals | None = None,
    sampler_at: SamplerAt | None = None,
    seed: int,
    max_new_tokens: int,
    eos_ids: tuple[int, ...],
    pad_id: int,
    checkpoints: Checkpoints,
    name: str = "training",
    on_metrics: OnMetrics | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> TrainResult:
    """Train the student in place, and return it with the weights of its lowest validation loss.

    Training goes on from a complete checkpoint of the same work in `checkpoints`, and on the CPU ends with the same
    weights, bit for bit, as without the interruption.

    Args:
        method: The source of responses and the objective, see `skd_lib.distillation.methods`.
        student: In fp32, trained in autocast of `training.precision`. With `training.lora` it is frozen while adapters
            are trained, which are then merged into it.
        teacher: Frozen; None for methods without a teacher.
        train: Training examples.
        validation: Held-out examples, for choosing the checkpoint.
        training: Optimiser, batches, steps.
        distill: Divergence and sampling; its method and training sections are not read. None for `sft`.
        signals: The teacher's signals from elsewhere; of the teacher then no more than its head is needed.
        sampler_at: Another engine that samples; None samples here.
        seed: Decides the order of examples, all sampling and dropout.
        max_new_tokens: Longest sampled response.
        eos_ids: Ids that end a response.
        pad_id: Padding; may be one of `eos_ids`.
        checkpoints: This run's checkpoints, see `skd_lib.training.checkpoints.checkpoint_key`.
        name: Name of this training in progress and errors.
        on_metrics: Receives each step's figures.
        callbacks: More callbacks for `transformers.Trainer`.

    Raises:
        SkdError: no examples, a missing teacher, an uneven batch, a validation loss that is not finite, or too many
            broken optimiser steps in a row.
        Preempted: SIGTERM came; the checkpoint of its step is complete.
    """
    for kind, examples in (("training", train), ("validation", validation)):
        if not examples:
            raise SkdError(f"there are no {kind} examples", where=name, hint="check the data and max_prompt_tokens")
    distill = distill or DistillConfig()
    if METHODS[method].needs_teacher and teacher is None and signals is None:
        raise SkdError(f"method `{method}` needs a teacher", where=name)
    for each in (student, teacher):
        if each is not None:
            check_supported(each)
    args = _arguments(training, len(train), seed, student)
    with checkpoints.attempt() as attempt:
        args.output_dir = str(attempt.folder)
        checkpoint = attempt.take_over()
        if checkpoint is not None:
            log.info("%s goes on from %s", name, checkpoint)
            args.eval_on_start = False  # the checkpoint's history has it
        model = _placed(student, teacher, training, args, seed, name)
        use_cache = student.config.use_cache
        strategy = rollout_for(
            method,
            student=model,
            teacher=teacher,
            distill=distill,
            steps=args.max_steps,
            seed=seed,
            eos_ids=eos_ids,
            pad_id=pad_id,
            max_new_tokens=max_new_tokens,
            sampler_at=sampler_at,
        )
        saver = Saver(attempt, training.keep_checkpoints, training.checkpoint_minutes)
        preemption = StopOnSigterm(saver)
        trainer = DistillationTrainer(
            model=model,
            args=args,
            training=training,
            objective=objective_for(method, teacher, distill),
            teacher=teacher,
            sharded=training.fsdp,
            divergence=METHODS[method].uses_divergence,
            strategy=strategy if signals is None else signals.attached(strategy, args.device),
            examples=train,
            stream=TrainingStream(len(train), training.batch_size, seed),
            validation=_validation_rollouts(
                validation,
                args.per_device_train_batch_size,
                pad_id,
                teacher if METHODS[method].uses_divergence else None,
                signals,
            ),
            name=name,
            recorder=TraceRecorder(
                common_vocabulary(student, teacher),
                recorded_steps(args.max_steps, training.eval_steps),
            ),
            saver=saver,
            on_metrics=on_metrics,
            callbacks=[TimedCheckpoints(saver, attempt.folder), preemption, *callbacks],
        )
        try:
            with attention_dropout(student, training.dropout), preemption.listening(), saver:
                trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        finally:
            student.config.use_cache = use_cache  # the Trainer turns it off
            trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)  # puts the forward without autocast back
            student.eval()
        if training.lora is not None:
            merge_lora(model)
        return _result(trainer, whole_model(student) if training.fsdp else student)


class _Arguments(TrainingArguments):
    """The Trainer's arguments, without its `DataParallel`: several devices are several processes (torchrun)."""

    @property
    def n_gpu(self) -> int:
        """Return the number of devices of this process."""
        return min(int(super().n_gpu), 1)


def _placed(
    student: PreTrainedModel,
    teacher: PreTrainedModel | None,
    training: TrainingConfig,
    args: TrainingArguments,
    seed: int,
    name: str,
) -> PreTrainedModel:
    """Put both models on their device, whole or sharded; return the student to train."""
    check_processes(args, sharded=training.fsdp, where=name, setting="training.fsdp")
    student.to(args.device)
    frozen = place_teacher(teacher, args.device)
    if training.fsdp:
        shard(student, frozen, args)
        return student
    return student if training.lora is None else add_lora(student, training.lora, seed)


def _arguments(training: TrainingConfig, examples: int, seed: int, student: PreTrainedModel) -> TrainingArguments:
    precision = resolve_precision(training.precision, student.device)
    args = _Arguments(
        use_cpu=student.device.type == "cpu",
        bf16=precision == "bf16",
        seed=seed,
        learning_rate=training.learning_rate,
        lr_scheduler_type=training.lr_scheduler,
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
        activation_checkpointing=training.gradient_checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False},
        optim="adamw_torch_fused",
        eval_strategy="steps",
        eval_on_start=True,
        save_strategy="steps",
        load_best_model_at_end=True,
        metric_for_best_model=TRAINER_VALIDATION_LOSS,
        greater_is_better=False,
        logging_steps=1,
        logging_nan_inf_filter=False,
        report_to="none",
        disable_tqdm=True,
        train_sampling_strategy="sequential",  # the order is the stream's
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,
    )
    # Otherwise the Trainer takes the precision of `accelerate launch`.
    args.mixed_precision = "bf16" if precision == "bf16" else "no"
    plan = plan_steps(training, examples, processes=args.world_size)
    args.per_device_train_batch_size = plan.micro_batch_size
    args.gradient_accumulation_steps = plan.accumulation
    args.max_steps = plan.steps
    args.warmup_steps = math.ceil(training.warmup_ratio * plan.steps)
    args.eval_steps = args.save_steps = min(training.eval_steps, plan.steps)
    return args


def _validation_rollouts(
    examples: Sequence[TokenizedExample],
    rows: int,
    pad_id: int,
    teacher: PreTrainedModel | None,
    signals: GivenSignals | None,
) -> list[Rollout]:
    """Collate ground-truth rollouts of `rows` rows on the CPU, sorted by length, with teacher signals if they fit."""
    by_length = sorted(examples, key=lambda example: len(example.prompt_ids) + len(example.response_ids))
    rollouts = []
    for start in range(0, len(by_length), rows):
        batch = by_length[start : start + rows]
        prompts, responses = [example.prompt_ids for example in batch], [example.response_ids for example in batch]
        rollout = collate(prompts, responses, pad_id=pad_id, source="ground_truth")
        if signals is not None:
            rollout = replace(rollout, signals=tuple(signals.along(example) for example in batch))
        rollouts.append(rollout)
    if teacher is None or signals is not None:
        return rollouts
    hidden = teacher.config.get_text_config(decoder=True).hidden_size
    if sum(rollout.tokens for rollout in rollouts) * hidden * teacher.dtype.itemsize > _VALIDATION_STATES_BYTES:
        return rollouts
    with evaluating(teacher):
        return [
            replace(rollout, signals=tuple(teacher_signals(teacher, rollout.to(teacher.device)))).to(_CPU)
            for rollout in rollouts
        ]


def _result(trainer: DistillationTrainer, student: PreTrainedModel) -> TrainResult:
    history = [entry for entry in trainer.state.log_history if "loss" in entry or VALIDATION_LOSS in entry]
    seconds: dict[str, float] = {}
    peak_bytes: dict[str, int] = {}
    for entry in history:
        for figure, value in entry.items():
            if figure.startswith(SECONDS):
                seconds[figure] = seconds.get(figure, 0.0) + value
            elif figure.startswith(PEAK_BYTES):
                phase = figure.removeprefix(PEAK_BYTES)
                peak_bytes[phase] = max(peak_bytes.get(phase, 0), int(value))
    return TrainResult(
        student=student,
        precision="bf16" if trainer.args.bf16 else "fp32",
        steps=trainer.state.global_step,
        best_step=trainer.state.best_global_step,
        best_validation_loss=trainer.state.best_metric,
        first_validation_loss=next(entry[VALIDATION_LOSS] for entry in history if VALIDATION_LOSS in entry),
        history=history,
        seconds=seconds,
        peak_bytes=peak_bytes,
        traces=[Trace.of(values) for entry in trainer.state.log_history for values in entry.get(TRACES, [])],
    )
