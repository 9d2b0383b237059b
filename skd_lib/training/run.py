"""`train`: one training run from models and examples to the best weights, resumable at any moment."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel, TrainerCallback, TrainingArguments

from skd_lib.config import DistillConfig, Method, TrainingConfig
from skd_lib.divergences import divergence
from skd_lib.errors import SkdError
from skd_lib.models.heads import vocabulary_size
from skd_lib.rollouts import Rollout, collate, rollout_for, teacher_response_states
from skd_lib.training.checkpoints import last_complete
from skd_lib.training.modes import attention_dropout, evaluating, native_bf16
from skd_lib.training.objectives import Objective, cross_entropy, distillation
from skd_lib.training.stream import TrainingStream
from skd_lib.training.timing import PEAK_BYTES, SECONDS
from skd_lib.training.traces import Replacement, Trace, TraceRecorder, recorded_steps
from skd_lib.training.trainer import (
    TRACES,
    TRAINER_VALIDATION_LOSS,
    VALIDATION_LOSS,
    DistillationTrainer,
    OnMetrics,
)

if TYPE_CHECKING:
    from skd_lib.data.tokenize import TokenizedExample

_VALIDATION_STATES_BYTES = 2**30
"""The teacher's states on the validation set are kept between validations if they take no more host memory."""
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainResult:
    """What a training run came to. The student holds the best checkpoint's weights.

    Attributes:
        steps: Optimiser steps.
        best_step: The step whose weights were kept.
        best_validation_loss: Its validation loss, the lowest.
        first_validation_loss: That of the model as it came in.
        history: The logged figures, each with its `step`, those from before a resume included.
        seconds: Seconds of each phase over the whole run.
        peak_bytes: The most memory that each phase took on this process's GPU; empty without one.
        traces: A few sampled sequences, in the order of training.
    """

    steps: int
    best_step: int
    best_validation_loss: float
    first_validation_loss: float
    history: list[dict[str, float]]
    seconds: dict[str, float]
    peak_bytes: dict[str, int]
    traces: list[Trace]

    def course(self, figure: str) -> tuple[float, float] | None:
        """Mean of a figure over the first and over the last tenth of the steps that logged it; None if none did."""
        values = [entry[figure] for entry in self.history if figure in entry]
        if not values:
            return None
        tenth = math.ceil(len(values) / 10)
        return sum(values[:tenth]) / tenth, sum(values[-tenth:]) / tenth


@dataclass(frozen=True)
class Schedule:
    """How many steps, and how a step's rows are divided.

    Attributes:
        steps: Optimiser steps.
        micro_batch_size: Rows of a forward pass on a device.
        accumulation: Forward passes of a device in a step.
    """

    steps: int
    micro_batch_size: int
    accumulation: int


def schedule(training: TrainingConfig, examples: int, processes: int) -> Schedule:
    """Divide the work.

    Raises:
        SkdError: the batch size does not divide evenly.
    """
    share, rest = divmod(training.batch_size, processes)
    if rest:
        raise SkdError(
            f"batch_size {training.batch_size} cannot be divided over {processes} devices",
            where="training.batch_size",
            hint=f"use a multiple of {processes}",
        )
    micro_batch_size = min(training.micro_batch_size or share, share)
    if share % micro_batch_size:
        raise SkdError(
            f"micro_batch_size {micro_batch_size} does not divide the {share} sequences a device has in a step",
            where="training.micro_batch_size",
            hint="use a divisor, so that every step has the same number of sequences",
        )
    steps = training.max_steps or math.ceil(training.epochs * examples / training.batch_size)
    return Schedule(steps, micro_batch_size, share // micro_batch_size)


def train(
    *,
    method: Method,
    student: PreTrainedModel,
    teacher: PreTrainedModel | None,
    train: Sequence[TokenizedExample],
    validation: Sequence[TokenizedExample],
    training: TrainingConfig,
    distill: DistillConfig | None = None,
    seed: int,
    max_new_tokens: int,
    eos_ids: tuple[int, ...],
    pad_id: int,
    checkpoint_dir: Path,
    name: str = "training",
    on_metrics: OnMetrics | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> TrainResult:
    """Train the student in place, and leave it with the weights of its lowest validation loss.

    If `checkpoint_dir` holds a complete checkpoint of the same work, training goes on from it, and on the CPU ends
    with the same weights, bit for bit, as if it had never stopped.

    Args:
        method: What is minimised, and where responses come from.
        student: In fp32; it is trained in bf16 autocast where its device multiplies in bf16 itself.
        teacher: Frozen; None for `sft`.
        train: Training examples.
        validation: Held-out examples, for choosing the checkpoint.
        training: Optimiser, batches, steps.
        distill: Divergence and sampling; its method and training sections are not read. None for `sft`.
        seed: Decides the order of examples, all sampling and dropout.
        max_new_tokens: Longest sampled response.
        eos_ids: Ids that end a response.
        pad_id: Fills rows up; may be one of `eos_ids`.
        checkpoint_dir: Folder of this run's checkpoints alone, see `skd_lib.training.checkpoints.checkpoint_dir`.
        name: What progress and errors call this training.
        on_metrics: Receives each step's figures.
        callbacks: More callbacks for `transformers.Trainer`.

    Raises:
        SkdError: no examples, a missing teacher, an uneven batch, or a loss that is not finite.
    """
    for kind, examples in (("training", train), ("validation", validation)):
        if not examples:
            raise SkdError(f"there are no {kind} examples", where=name, hint="check the data and max_prompt_tokens")
    distill = distill or DistillConfig()
    objective = _objective(method, teacher, distill)
    args = _arguments(training, len(train), seed, checkpoint_dir, student)
    checkpoint = last_complete(checkpoint_dir)
    if checkpoint is not None:
        log.info("%s goes on from %s", name, checkpoint)
        args.eval_on_start = False  # the checkpoint's history has it
    student.to(args.device)
    if teacher is not None:
        teacher.to(args.device).eval().requires_grad_(requires_grad=False)
    use_cache = student.config.use_cache
    trainer = DistillationTrainer(
        model=student,
        args=args,
        objective=objective,
        strategy=rollout_for(
            method,
            student=student,
            teacher=teacher,
            distill=distill,
            seed=seed,
            eos_ids=eos_ids,
            pad_id=pad_id,
            max_new_tokens=max_new_tokens,
        ),
        examples=train,
        stream=TrainingStream(len(train), training.batch_size, seed),
        validation=_validation_rollouts(
            validation, args.per_device_train_batch_size, pad_id, None if method == "sft" else teacher
        ),
        name=name,
        recorder=TraceRecorder(
            teacher,
            min(vocabulary_size(model) for model in (student, teacher) if model is not None),
            recorded_steps(args.max_steps, training.eval_steps),
        ),
        on_metrics=on_metrics,
        callbacks=callbacks,
    )
    try:
        with attention_dropout(student, training.dropout):
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    finally:
        student.config.use_cache = use_cache  # the Trainer turns it off
        student.eval()
    return _result(trainer)


def _objective(method: Method, teacher: PreTrainedModel | None, distill: DistillConfig) -> Objective:
    if method == "sft":
        return cross_entropy
    if teacher is None:
        raise SkdError(f"method `{method}` needs a teacher")
    return distillation(teacher, divergence(distill.divergence, distill.beta), distill.temperature)


class _Arguments(TrainingArguments):
    """The Trainer's arguments, without its `DataParallel`: several devices are several processes (torchrun)."""

    @property
    def n_gpu(self) -> int:
        """Devices of this process."""
        return min(int(super().n_gpu), 1)


def _arguments(
    training: TrainingConfig, examples: int, seed: int, folder: Path, student: PreTrainedModel
) -> TrainingArguments:
    args = _Arguments(
        output_dir=str(folder),
        use_cpu=student.device.type == "cpu",
        bf16=native_bf16(student.device),
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
    plan = schedule(training, examples, args.world_size)
    args.per_device_train_batch_size = plan.micro_batch_size
    args.gradient_accumulation_steps = plan.accumulation
    args.max_steps = plan.steps
    args.warmup_steps = math.ceil(training.warmup_ratio * plan.steps)
    args.eval_steps = args.save_steps = min(training.eval_steps, plan.steps)
    return args


def _validation_rollouts(
    examples: Sequence[TokenizedExample], rows: int, pad_id: int, teacher: PreTrainedModel | None
) -> list[Rollout]:
    """Ground-truth rollouts of `rows` rows on the CPU, like lengths together, with the teacher's states if they fit."""
    by_length = sorted(examples, key=lambda example: len(example.prompt_ids) + len(example.response_ids))
    rollouts = []
    for start in range(0, len(by_length), rows):
        batch = by_length[start : start + rows]
        prompts, responses = [example.prompt_ids for example in batch], [example.response_ids for example in batch]
        rollouts.append(collate(prompts, responses, pad_id=pad_id, source="ground_truth"))
    if teacher is None:
        return rollouts
    hidden = teacher.config.get_text_config(decoder=True).hidden_size
    if sum(rollout.tokens for rollout in rollouts) * hidden * teacher.dtype.itemsize > _VALIDATION_STATES_BYTES:
        return rollouts
    with evaluating(teacher):
        states = [teacher_response_states(teacher, rollout.to(teacher.device)).cpu() for rollout in rollouts]
    return [replace(rollout, teacher_states_NH=part) for rollout, part in zip(rollouts, states, strict=True)]


def _result(trainer: DistillationTrainer) -> TrainResult:
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
        steps=trainer.state.global_step,
        best_step=trainer.state.best_global_step,
        best_validation_loss=trainer.state.best_metric,
        first_validation_loss=next(entry[VALIDATION_LOSS] for entry in history if VALIDATION_LOSS in entry),
        history=history,
        seconds=seconds,
        peak_bytes=peak_bytes,
        traces=[_trace(values) for entry in trainer.state.log_history for values in entry.get(TRACES, [])],
    )


def _trace(values: dict[str, Any]) -> Trace:
    return Trace(**{**values, "replacements": [Replacement(**each) for each in values["replacements"]]})
