"""What a training step costs, in tokens: the account by which methods are compared at equal compute."""

from __future__ import annotations

from dataclasses import dataclass

from skd_lib.distillation.batch import Rollout
from skd_lib.sampling.samples import SamplingStatistics


@dataclass(frozen=True)
class TokensProcessed:
    """Token positions that went through a model's decoder; padding, and the backward pass, are left out.

    Attributes:
        student: While sampling, as the sampler counted them; and whole sequences for the loss.
        teacher: While sampling, as the sampler counted them; and whole sequences for the loss where what it says is not
            known from sampling. Nothing that was asked before training.
    """

    student: int
    teacher: int


def tokens_processed(rollout: Rollout, *, divergence: bool) -> TokensProcessed:
    """Return the cost of one optimiser step's rollout and of its loss.

    Args:
        rollout: All rows of the step.
        divergence: The loss is a divergence from the teacher; else nothing is asked of it.
    """
    sequences = rollout.sequence_lengths
    sampled = rollout.statistics or SamplingStatistics()
    asked = [whole for whole, signal in zip(sequences, rollout.signals, strict=True) if divergence and signal is None]
    return TokensProcessed(
        student=sampled.student_positions + sum(sequences), teacher=sampled.teacher_positions + sum(asked)
    )
