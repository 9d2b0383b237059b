"""What tells the training methods apart, for whoever loads models, estimates memory or checks a configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Any

from skd_lib.config import DistillConfig, Method


@dataclass(frozen=True)
class MethodFacts:
    """One method.

    Attributes:
        student_writes: The student writes tokens of the responses (drafts at least).
        teacher_writes: The teacher writes tokens of the responses.
        divergence: The loss is a divergence from the teacher; else it is the response's cross-entropy.
    """

    student_writes: bool
    teacher_writes: bool
    divergence: bool

    @property
    def needs_teacher(self) -> bool:
        """Whether there is anything for a teacher to do."""
        return self.teacher_writes or self.divergence


METHODS: Mapping[Method, MethodFacts] = {
    "sft": MethodFacts(student_writes=False, teacher_writes=False, divergence=False),
    "seqkd": MethodFacts(student_writes=False, teacher_writes=True, divergence=False),
    "supervised_kd": MethodFacts(student_writes=False, teacher_writes=False, divergence=True),
    "on_policy": MethodFacts(student_writes=True, teacher_writes=False, divergence=True),
    "imitkd": MethodFacts(student_writes=True, teacher_writes=False, divergence=True),
    "two_stage": MethodFacts(student_writes=True, teacher_writes=False, divergence=True),
    "skd": MethodFacts(student_writes=True, teacher_writes=True, divergence=True),
    "skd_mixed": MethodFacts(student_writes=True, teacher_writes=True, divergence=True),
}


_PARAMETERS = ("divergence", "sampling.top_k", "sampling.gamma")
"""The pipeline's own parameters always have a value."""


def unread_settings(distill: DistillConfig) -> list[str]:
    """Fields that have a value of their own, not the default, and that this method with this divergence never reads.

    The pipeline's own parameters (`divergence`, `top_k`, `gamma`) are left out: they always have a value.
    """
    default = DistillConfig()
    return [
        path
        for path, is_read in _reads(distill).items()
        if not is_read and path not in _PARAMETERS and _at(distill, path) != _at(default, path)
    ]


def reads_setting(distill: DistillConfig, path: str) -> bool:
    """Whether this method with this divergence reads the field at `path` of section `distill`, or a field in it."""
    return all(is_read for known, is_read in _reads(distill).items() if f"{path}.".startswith(f"{known}."))


def _reads(distill: DistillConfig) -> dict[str, bool]:
    """The fields that not every method and divergence reads, and whether these do."""
    facts, loss, rule = METHODS[distill.method], distill.divergence, distill.sampling.rule
    interleaved = facts.student_writes and facts.teacher_writes
    return {
        "divergence": facts.divergence,
        "beta": facts.divergence and loss == "jsd",
        "alpha": facts.divergence and loss in ("skew_kl", "skew_reverse_kl"),
        "temperature": facts.divergence,
        "temperature_squared": facts.divergence,
        "selective": facts.divergence,
        "replaced_weight": interleaved,
        "on_policy_fraction": distill.method == "on_policy",
        "sampled_fraction": distill.method in ("imitkd", "skd_mixed"),
        "teacher_signal": facts.needs_teacher,
        "sampling.rule": interleaved,
        "sampling.top_k": interleaved and rule == "top_k",
        "sampling.gamma": interleaved,
        "sampling.min_prob": interleaved and rule == "min_prob",
        "sampling.mixture": interleaved and rule == "mixture",
        "sampling.student": facts.student_writes,
        "sampling.teacher": facts.teacher_writes,
    }


def _at(distill: DistillConfig, path: str) -> Any:
    return reduce(getattr, path.split("."), distill)
