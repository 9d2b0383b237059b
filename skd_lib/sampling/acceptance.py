"""Acceptance rules: which drafted tokens the teacher lets stand, and what replaces the first that it does not.

One engine with another rule is another algorithm:

==============  ==================================  ===========================  ===================================
rule            accepts drafted token t if          on rejection samples         it is
==============  ==================================  ===========================  ===================================
`top_k(K)`      rank of t among raw teacher         p                            SKD (Xu et al. 2025, section 3)
                logits < K
`everything()`  always                              -                            student generation, on-policy KD
`nothing()`     never                               p                            teacher generation, SeqKD data
`lossless()`    u < min(1, p(t) / q(t))             max(p - q, 0), normalised    speculative decoding
                                                                                 (Leviathan et al. 2023)
==============  ==================================  ===========================  ===================================

p and q are the teacher's and the student's distributions after temperature and top-p.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from skd_lib.config import SamplingParams
from skd_lib.sampling.distributions import warp


@dataclass(frozen=True)
class Block:
    """What a rule sees of one drafted block.

    Attributes:
        drafts_BG: Drafted tokens.
        teacher_logits_BGV: Raw teacher logits at the drafted positions, before temperature, top-p or anything else.
        student_probs_BGV: The distributions the drafts were drawn from; None unless the rule needs them.
        uniforms_BG: One uniform number a drafted token.
        teacher_params: How the teacher samples.
    """

    drafts_BG: Tensor
    teacher_logits_BGV: Tensor
    student_probs_BGV: Tensor | None
    uniforms_BG: Tensor
    teacher_params: SamplingParams

    @cached_property
    def teacher_probs_BGV(self) -> Tensor:  # noqa: N802
        """The teacher's distributions after its temperature and top-p."""
        return warp(self.teacher_logits_BGV, self.teacher_params)


Accept = Callable[[Block], Tensor]
"""(B, G) bool: would each drafted token be accepted, given that all before it were?"""
Correct = Callable[[Tensor, Tensor], Tensor]
"""(B, V) teacher and student probabilities at the rejected position -> (B, V) weights to draw the replacement from."""


@dataclass(frozen=True)
class AcceptanceRule:
    """One row of the table above.

    Attributes:
        name: As in the table.
        accept: None where no token is tested: nothing is drafted, or nobody asks the teacher.
        correct: What a replacement is sampled from; None is the teacher's distribution.
        drafts: Whether the student drafts at all.
        asks_teacher: Whether the teacher scores the drafts.
        needs_student_probs: Whether `accept` and `correct` read the student's distributions.
        bonus: Whether the teacher adds a token of its own after a block that was accepted whole.
    """

    name: str
    accept: Accept | None = None
    correct: Correct | None = None
    drafts: bool = True
    asks_teacher: bool = True
    needs_student_probs: bool = False
    bonus: bool = False


def top_k(k: int) -> AcceptanceRule:
    """SKD: a token stands if fewer than `k` tokens have a higher raw teacher logit (k = 0: none, k = V: all)."""

    def accept(block: Block) -> Tensor:
        drafted = block.teacher_logits_BGV.gather(-1, block.drafts_BG.unsqueeze(-1))
        return (block.teacher_logits_BGV > drafted).sum(-1) < k

    return AcceptanceRule(f"top_k({k})", accept)


def everything() -> AcceptanceRule:
    """The student alone; the teacher is never asked."""
    return AcceptanceRule("everything", asks_teacher=False)


def nothing() -> AcceptanceRule:
    """The teacher alone; nothing is drafted."""
    return AcceptanceRule("nothing", drafts=False)


def lossless() -> AcceptanceRule:
    """Speculative decoding: the output is distributed exactly as the teacher's own."""

    def accept(block: Block) -> Tensor:
        assert block.student_probs_BGV is not None  # noqa: S101 - the rule asks for them
        drafted = block.drafts_BG.unsqueeze(-1)
        p = block.teacher_probs_BGV.gather(-1, drafted).squeeze(-1)
        q = block.student_probs_BGV.gather(-1, drafted).squeeze(-1)
        return block.uniforms_BG * q < p

    return AcceptanceRule("lossless", accept, _from_residual, needs_student_probs=True, bonus=True)


def _from_residual(p_BV: Tensor, q_BV: Tensor) -> Tensor:
    residual = (p_BV - q_BV).clamp_min(0)
    # p = q leaves no residual; a rejection is then rounding, and p is the right distribution.
    return torch.where(residual.sum(-1, keepdim=True) > 0, residual, p_BV)
