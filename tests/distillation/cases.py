"""Divergences as functions of two models' logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from skd_lib.distillation.divergences import divergence
from skd_lib.distillation.teacher_signal import log_probs


@dataclass(frozen=True)
class Case:
    name: str
    f: Callable[[Tensor, Tensor], Tensor]

    def __call__(self, teacher_logits: Tensor, student_logits: Tensor, temperature: float = 1.0) -> Tensor:
        return self.f(*log_probs(teacher_logits, student_logits, temperature))

    def __str__(self) -> str:
        return self.name


def case(name: str, **settings: float) -> Case:
    numbers = "".join(f"({value:g})" for value in settings.values())
    return Case(name + numbers, divergence(name, **settings))


forward_kl, reverse_kl, tvd, adaptive_kl = map(case, ("forward_kl", "reverse_kl", "tvd", "adaptive_kl"))


def jsd(beta: float) -> Case:
    return case("jsd", beta=beta)


def skew_kl(alpha: float) -> Case:
    return case("skew_kl", alpha=alpha)


def skew_reverse_kl(alpha: float) -> Case:
    return case("skew_reverse_kl", alpha=alpha)
