"""What a training step costs, in tokens: the account by which methods are compared at equal compute."""

from __future__ import annotations

from dataclasses import dataclass

from skd_lib.batches import Rollout
from skd_lib.sampling.samples import SamplingStatistics


@dataclass(frozen=True)
class TokensProcessed:
    """Token positions that went through a model's forward pass; padding, and the backward pass, are left out.

    Attributes:
        student: Prompts and drafts while sampling, and whole sequences for the loss.
        teacher: Prompts, verified drafts and its own tokens while sampling, and whole sequences for the loss where what
            it says is not known from sampling. Nothing that was asked before training.
    """

    student: int
    teacher: int


def tokens_processed(rollout: Rollout, *, divergence: bool) -> TokensProcessed:
    """The cost of one optimiser step's rollout and of its loss.

    Args:
        rollout: All rows of the step.
        divergence: The loss is a divergence from the teacher; else nothing is asked of it.
    """
    sequences = rollout.sequence_lengths
    prompts = [whole - response for whole, response in zip(sequences, rollout.lengths, strict=True)]
    sampled = rollout.statistics or SamplingStatistics()
    student, teacher = sum(sequences) + sampled.student_calls, sampled.teacher_calls
    if sampled.teacher_calls:
        teacher += sampled.drafted  # a call reads the block and the token before it
    for source, prompt, whole, signal in zip(rollout.sources, prompts, sequences, rollout.signals, strict=True):
        student += prompt if source in ("student", "interleaved") else 0
        teacher += prompt if source in ("teacher", "interleaved") else 0
        teacher += whole if divergence and signal is None else 0
    return TokensProcessed(student, teacher)
