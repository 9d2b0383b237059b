"""The models of a training step: load them, save the trained one, and record its origin."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skd_lib._core.machine import pipeline_run_id
from skd_lib.config import Precision, TeacherPrecision, TrainingConfig
from skd_lib.models.files import weights_digest

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from skd_lib.models.precision import Resolved
    from skd_lib.tracking.runs import StepRun
    from skd_lib.training.run import TrainResult

SUMMED = ("response_tokens", "student_tokens", "teacher_tokens")
"""Figures of each step of which the closing figures hold the sum, as they do of the seconds."""
_GROUPS = {"validation_": "validation/", "seconds_": "time/", "peak_bytes_": "memory/"}
"""Groups of metrics in MLflow by the beginning of a figure's name; all others are in `train/`."""


def run_facts(run: StepRun) -> dict[str, str]:
    """Return what a model's record says of the run that makes the model; unknown facts are empty."""
    from skd_lib.models.records import software
    from skd_lib.tracking.locate import IMAGE_VARIABLE

    return {
        "pipeline_run_id": pipeline_run_id(),
        "mlflow_run_id": run.parent.run_id,
        "image": os.environ.get(IMAGE_VARIABLE, ""),
        "software": software(),
        "code_version": code_version(),
    }


def code_version() -> str:
    """Return the version of the code that makes a model: the image's own name for it, else the package's version."""
    from skd_lib import __version__

    return os.environ.get("SKD_CODE_VERSION") or __version__


def training_facts(training: TrainingConfig, result: TrainResult) -> dict[str, Any]:
    """Return the settings of a training that a model's card shows."""
    unused = {"epochs"} if training.max_steps else {"max_steps"}
    facts = training.model_dump(exclude_none=True, exclude=unused)
    return {**facts, "precision": result.precision, "best_step": result.best_step}


def load_trainable(path: Path) -> PreTrainedModel:
    """Load a model with fp32 master weights: small updates would be lost in bf16."""
    import torch

    from skd_lib.models.loading import load_model

    _hide_progress_bars()
    return load_model(path, dtype=torch.float32)


def load_frozen(path: Path, precision: TeacherPrecision = "auto", *, computing: Precision = "auto") -> PreTrainedModel:
    """Load a model that is only read, with weights of `precision`; see `DistillTrainingConfig.teacher_precision`.

    `computing` is the precision of computations with it, and of its weights if `precision` is `auto`.
    """
    from skd_lib.models.loading import default_device, load_model
    from skd_lib.models.precision import DTYPES, compute_dtype

    _hide_progress_bars()
    whole = DTYPES[precision] if precision in ("fp32", "bf16") else compute_dtype(computing, default_device())
    return load_model(path, dtype=whole, quantization=precision if precision in ("8bit", "4bit") else None)


def _hide_progress_bars() -> None:
    """Hide transformers' progress bars: a step's log is read in a pod's log, or under a runner's own bars."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()


def save_trained(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: Path, card: str, precision: Resolved
) -> str:
    """Save a model in the precision of its training, and return the digest of its weights."""
    from skd_lib.models.loading import save_model
    from skd_lib.models.precision import DTYPES

    save_model(model.to(DTYPES[precision]), tokenizer, path, card)
    return weights_digest(path)


def log_outcome(run: StepRun, figures: Mapping[str, float], lineage: Mapping[str, Any], model_uri: str) -> None:
    """Log a step's closing figures, in the group `final/`, and its model's lineage to MLflow."""
    run.log_metrics({f"final/{name}": value for name, value in figures.items()})
    run.set_tags({"model_uri": model_uri, **{name: value for name, value in lineage.items() if value != ""}})


def grouped(figures: Mapping[str, float]) -> dict[str, float]:
    """Return the figures of a training's optimiser step or validation by their names in MLflow, e.g. `train/loss`."""
    return {_metric(name): value for name, value in figures.items()}


def _metric(figure: str) -> str:
    for beginning, group in _GROUPS.items():
        if figure.startswith(beginning):
            return group + figure.removeprefix(beginning)
    return f"train/{figure}"
