"""Speculative Knowledge Distillation: interleaved sampling, training, evaluation and the pipeline's steps.

The names below are the public interface; they are loaded when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from skd_lib.distillation.divergences import divergence
    from skd_lib.distillation.loss import DistillationLoss
    from skd_lib.errors import SkdError
    from skd_lib.interface import Distilled, benchmark, distill, evaluate
    from skd_lib.sampling.acceptance import lossless, min_prob, mixture, student_only, teacher_only, top_k
    from skd_lib.sampling.interleaved import InterleavedOutput, InterleavedSampler
    from skd_lib.training.skd_config import SKDConfig
    from skd_lib.training.skd_trainer import SKDTrainer

try:
    __version__ = version("skd-lib")
except PackageNotFoundError:  # running from a source tree that was never installed
    __version__ = "0.0.0"

__all__ = [
    "DistillationLoss",
    "Distilled",
    "InterleavedOutput",
    "InterleavedSampler",
    "SKDConfig",
    "SKDTrainer",
    "SkdError",
    "benchmark",
    "distill",
    "divergence",
    "evaluate",
    "lossless",
    "min_prob",
    "mixture",
    "student_only",
    "teacher_only",
    "top_k",
]

_RULES = "skd_lib.sampling.acceptance"
_INTERFACE = "skd_lib.interface"
_MODULES = {
    "DistillationLoss": "skd_lib.distillation.loss",
    "InterleavedOutput": "skd_lib.sampling.interleaved",
    "InterleavedSampler": "skd_lib.sampling.interleaved",
    "SKDConfig": "skd_lib.training.skd_config",
    "SKDTrainer": "skd_lib.training.skd_trainer",
    "SkdError": "skd_lib.errors",
    "divergence": "skd_lib.distillation.divergences",
    **dict.fromkeys(("Distilled", "benchmark", "distill", "evaluate"), _INTERFACE),
    **dict.fromkeys(("lossless", "min_prob", "mixture", "student_only", "teacher_only", "top_k"), _RULES),
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(import_module(_MODULES[name]), name)
    except ModuleNotFoundError as error:
        from skd_lib._core.bugs import install_command

        missing = str(error.name)
        message = f"`skd_lib.{name}` needs the package `{missing}`: {install_command(missing)}"
        raise ModuleNotFoundError(message, name=missing) from error


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
