"""What the training steps share: data to tokens, a resumable run, and what is told about the model that comes out."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from skd_lib.config import DistillConfig, Method, Precision, TaskConfig, TeacherPrecision, TrainingConfig
from skd_lib.models.files import weights_digest
from skd_lib.storage import checkpoint_folder, is_remote

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from skd_lib.data.prepared import PreparedData
    from skd_lib.data.tokenize import TokenizedExample
    from skd_lib.models.precision import Resolved
    from skd_lib.preflight.memory import Estimate
    from skd_lib.tracking.runs import StepRun
    from skd_lib.training.checkpoints import Checkpoints
    from skd_lib.training.run import TrainResult

log = logging.getLogger(__name__)
DATA_HELP = "Folder that `prepare_data` wrote."
LEFT_OUT = "left_out_"
"""Figures: how many examples of a split have prompts over the limit."""
SUMMED = ("response_tokens", "student_tokens", "teacher_tokens")
"""Figures of each step of a training of which its closing figures hold the sum, as they do of the seconds."""


@dataclass(frozen=True)
class Fit:
    """One training step's settings and surroundings.

    Attributes:
        step: Name of the pipeline step.
        method: How the model is trained.
        split: Which training examples are used.
        training: Optimiser, batches, steps.
        distill: Divergence and sampling; None for fine-tuning.
        task: Template and limits.
        seed: Seed of everything random.
        checkpoint_root: Folder or URI for checkpoints, which are removed when the step has written its model. The same
            work, started again, goes on from its last one if the storage outlives the process. Empty: temporary files.
        models: Folders of the models that go in, by name.
        weights: Digests of their weights.
    """

    step: str
    method: Method
    split: Literal["train_teacher", "train_student"]
    training: TrainingConfig
    distill: DistillConfig | None
    task: TaskConfig
    seed: int
    checkpoint_root: str
    models: dict[str, Path]
    weights: dict[str, str]

    @property
    def precision(self) -> Resolved:
        """In which this machine trains."""
        from skd_lib.models.loading import default_device
        from skd_lib.models.precision import resolve_precision

        return resolve_precision(self.training.precision, default_device())

    def checkpoints(self, tokens: Mapping[str, Sequence[TokenizedExample]], limits: Mapping[str, Any]) -> Checkpoints:
        """The checkpoints of this very work.

        What the models read goes into the key as token ids: whatever changes a prompt or a target changes it, be it the
        data, the tokenizer, the chat template, the date in that or a limit on lengths, and nothing else does.

        Args:
            tokens: The training and validation examples.
            limits: Ids that end and fill up sequences, and the longest answer.
        """
        from skd_lib import __version__
        from skd_lib.models.fingerprint import settings_digest
        from skd_lib.training.checkpoints import Checkpoints, checkpoint_key
        from skd_lib.training.stored_teacher import examples_digest

        key = checkpoint_key(
            self.step,
            version=__version__,
            method=self.method,
            training=self.training.model_dump(mode="json", exclude={"checkpoint_minutes", "keep_checkpoints"}),
            precision=self.precision,
            # Another number of nodes goes on from the same checkpoints.
            distill=self.distill and self.distill.model_dump(mode="json", exclude={"multinode", "training"}),
            seed=self.seed,
            tokens={use: examples_digest(examples) for use, examples in tokens.items()},
            limits=dict(limits),
            weights=self.weights,
            settings={name: settings_digest(folder) for name, folder in self.models.items()},
        )
        root = self.checkpoint_root.rstrip("/")
        return Checkpoints(checkpoint_folder(root) / key, f"{root}/{key}" if is_remote(root) else "")

    def run(
        self,
        student: PreTrainedModel,
        load_teacher: Callable[[], PreTrainedModel] | None,
        tokenizer: PreTrainedTokenizerBase,
        data: PreparedData,
        data_uri: str,
        run: StepRun,
    ) -> tuple[TrainResult, dict[str, float], Checkpoints]:
        """Train `student` in place.

        Args:
            student: The model in training.
            load_teacher: Makes the frozen teacher; None where there is nothing for it to do.
            tokenizer: Both models' tokenizer.
            data: Prepared data.
            data_uri: Where that is.
            run: The step's MLflow run.

        Returns:
            The result, its closing figures, and the checkpoints, to be removed when all is written.

        Raises:
            SkdError: see `skd_lib.training.run.train`.
        """
        from skd_lib.data.tokenize import answer_end_id, encode_all
        from skd_lib.evaluation.inference import ending_ids
        from skd_lib.models.fingerprint import settings_digest
        from skd_lib.models.special_ids import pad_id
        from skd_lib.models.vocabulary import check_ids, vocabulary_size
        from skd_lib.preflight.memory import GIB, peak_memory
        from skd_lib.steps.storing import EarlyTeacher
        from skd_lib.training.run import train

        examples = {self.split: getattr(data, self.split), "validation": data.validation}
        for name, context in ((self.split, "train"), ("validation", "validation")):
            digest = data.manifest["sha256"][f"{name}.jsonl"]
            run.log_dataset(name, digest, data_uri, context=context, rows=len(examples[name]))
        end = answer_end_id(tokenizer, self.task)
        tokens = {name: encode_all(tokenizer, self.task, rows, end) for name, rows in examples.items()}
        left_out = {f"{LEFT_OUT}{name}": float(len(rows) - len(tokens[name])) for name, rows in examples.items()}
        rows = min(map(vocabulary_size, self.models.values()))
        for each in tokens.values():
            check_ids(each, rows, where=self.step)
        start = time.monotonic()
        limits: dict[str, Any] = {
            "eos_ids": ending_ids(student, tokenizer, self.task),
            "pad_id": pad_id(tokenizer, rows),
            "max_new_tokens": self.task.max_new_tokens,
        }
        method, teacher, signals = self.method, None, None
        if load_teacher is not None and self.distill is not None:
            if self.distill.teacher_signal.mode == "online":
                teacher = load_teacher()
            else:
                early = EarlyTeacher(
                    checkpoint_folder(self.checkpoint_root),
                    f"{self.weights['teacher']} {settings_digest(self.models['teacher'])}",
                    load_teacher,
                    student,
                    self.distill,
                    self.precision,
                )
                if method == "seqkd":
                    # What the teacher has written once is data like any other.
                    method = "sft"
                    tokens[self.split] = early.responses(tokens[self.split], seed=self.seed, limits=limits)
                else:
                    both = [*tokens[self.split], *tokens["validation"]]
                    signals = early.signals(both, pad_id=limits["pad_id"])
        checkpoints = self.checkpoints({"train": tokens[self.split], "validation": tokens["validation"]}, limits)
        result = train(
            method=method,
            student=student,
            teacher=teacher,
            train=tokens[self.split],
            validation=tokens["validation"],
            training=self.training,
            distill=self.distill,
            signals=signals,
            seed=self.seed,
            **limits,
            checkpoints=checkpoints,
            name=self.step,
            on_metrics=lambda step, figures: run.log_metrics(figures, step=step),
        )
        seconds = time.monotonic() - start
        planned = self._estimate(student, teacher)
        memory = {"peak_memory_gib": peak_memory(student.device) / GIB, "estimated_memory_gib": planned.total / GIB}
        log.info("estimated memory of %s; at the peak it was %.2f GiB", planned, memory["peak_memory_gib"])
        return result, {**result_figures(result), **left_out, **memory, "seconds": seconds}, checkpoints

    def _estimate(self, student: PreTrainedModel, teacher: PreTrainedModel | None) -> Estimate:
        from skd_lib.preflight.memory import config_size, estimate

        return estimate(
            self.step,
            self.method,
            self.training,
            self.task,
            config_size(student.config),
            None if teacher is None else config_size(teacher.config),
            divergence="forward_kl" if self.distill is None else self.distill.divergence,
            device=student.device,
        )


def fine_tune(
    fit: Fit,
    out: Path,
    *,
    base: str,
    title: str,
    data: PreparedData,
    data_uri: str,
    run: StepRun,
    loaded: Callable[[], None] = lambda: None,
) -> tuple[dict[str, Any], dict[str, float], Checkpoints] | None:
    """Fine-tune a model on ground truth and save it to `out`, with a card.

    Args:
        fit: The training's settings, with the one model that goes in.
        out: Where it is saved.
        base: What the model came from, for its card.
        title: Its card's title.
        data: Prepared data.
        data_uri: Where that is.
        run: The step's MLflow run.
        loaded: Called once the model's files are read.

    Returns:
        Lineage for the record, figures, and the checkpoints, to be removed when the outputs are written; None on a
        process that writes no outputs.
    """
    from skd_lib.models.card import Lineage, model_card
    from skd_lib.models.files import load_tokenizer

    (folder,) = fit.models.values()
    model, tokenizer = load_trainable(folder), load_tokenizer(folder)
    loaded()
    result, figures, checkpoints = fit.run(model, None, tokenizer, data, data_uri, run)
    if not is_main_process():
        return None
    lineage = Lineage(
        base=base,
        method="sft",
        data_fingerprint=data.fingerprint,
        code_version=code_version(),
        settings=training_facts(fit.training, result),
    )
    (base_digest,) = fit.weights.values()
    facts = {
        "weights_sha256": save_trained(result.student, tokenizer, out, model_card(title, lineage), result.precision),
        "precision": result.precision,
        "base_weights_sha256": base_digest,
        "data_fingerprint": data.fingerprint,
    }
    return facts, figures, checkpoints


def trained_here(run: StepRun) -> dict[str, str]:
    """Return what a model's record tells of the run that made the model; what is not known is empty.

    Args:
        run: The step's MLflow run.
    """
    from skd_lib.report.lineage import software
    from skd_lib.tracking.locate import IMAGE_VARIABLE

    return {
        "pipeline_run_id": os.environ.get("KFP_RUN_ID", ""),
        "mlflow_run_id": run.parent.run_id,
        "image": os.environ.get(IMAGE_VARIABLE, ""),
        "software": software(),
        "code_version": code_version(),
    }


def code_version() -> str:
    """Version of the code that makes a model: the image's own name for it, else the package's version."""
    from skd_lib import __version__

    return os.environ.get("SKD_CODE_VERSION") or __version__


def training_facts(training: TrainingConfig, result: TrainResult) -> dict[str, Any]:
    """How a model was trained, for its card."""
    unused = {"epochs"} if training.max_steps else {"max_steps"}
    facts = training.model_dump(exclude_none=True, exclude=unused)
    return {**facts, "precision": result.precision, "best_step": result.best_step}


def is_main_process() -> bool:
    """Whether this process writes the step's outputs; of several that train together one does."""
    return int(os.environ.get("RANK") or 0) == 0


def load_trainable(path: Path) -> PreTrainedModel:
    """A model with fp32 master weights on this process's device: small updates would be lost in bf16."""
    import torch

    from skd_lib.models.loading import load_model

    _quiet()
    return load_model(path, dtype=torch.float32)


def load_frozen(path: Path, precision: TeacherPrecision = "auto", *, computing: Precision = "auto") -> PreTrainedModel:
    """A model that is only read.

    Args:
        path: Its folder.
        precision: Of its weights; see `DistillTrainingConfig.teacher_precision`.
        computing: Of what is computed with it, and of its weights unless `precision` says otherwise.
    """
    from skd_lib.models.loading import default_device, load_model
    from skd_lib.models.precision import DTYPES, compute_dtype

    _quiet()
    whole = DTYPES[precision] if precision in ("fp32", "bf16") else compute_dtype(computing, default_device())
    return load_model(path, dtype=whole, quantization=precision if precision in ("8bit", "4bit") else None)


def save_trained(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: Path, card: str, precision: Resolved
) -> str:
    """Save a model in the precision of its training; returns the digest of its weights."""
    from skd_lib.models.loading import save_model
    from skd_lib.models.precision import DTYPES

    save_model(model.to(DTYPES[precision]), tokenizer, path, card)
    return weights_digest(path)


def log_outcome(run: StepRun, figures: Mapping[str, float], lineage: Mapping[str, Any], model_uri: str) -> None:
    """Give a step's closing figures and its model's lineage to MLflow."""
    # In MLflow a name is a curve: a sum over all steps is not a point of it.
    run.log_metrics({f"total_{name}" if _is_sum(name) else name: value for name, value in figures.items()})
    run.set_tags({"model_uri": model_uri, **{name: value for name, value in lineage.items() if value != ""}})


def _is_sum(name: str) -> bool:
    from skd_lib.training.timing import SECONDS

    return name in SUMMED or name.startswith(SECONDS)


def result_figures(result: TrainResult) -> dict[str, float]:
    """A training's closing figures, with the first and the last tenth of what the sampler did."""
    figures: dict[str, float] = {
        "steps": result.steps,
        "best_step": result.best_step,
        "best_validation_loss": result.best_validation_loss,
        "first_validation_loss": result.first_validation_loss,
        **{name: result.total(name) for name in SUMMED},
        **result.seconds,
    }
    for name in ("rejection_rate", "tokens_per_teacher_call", "truncated_fraction"):
        course = result.course(name)
        if course is not None:
            figures[f"{name}_first_tenth"], figures[f"{name}_last_tenth"] = course
    return figures


def _quiet() -> None:
    """Without transformers' progress bars: a step's log is read in a pod's log or behind a runner's own bars."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
