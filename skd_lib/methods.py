"""What tells the training methods apart, for whoever loads models, estimates memory or checks a configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from skd_lib.config import Method


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
