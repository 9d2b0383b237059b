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
`min_prob(a)`   p(t) >= a, before temperature and   argmax p                     CA-OPD (arXiv 2609.02401)
                top-p
`mixture(g)`    u < min(1, 1 - g + g p(t) / q(t))   max(p - q, 0), normalised    exact samples of
                                                                                 (1 - g) q + g p
==============  ==================================  ===========================  ===================================

p and q are the teacher's and the student's distributions after temperature and top-p, unless the table says before.
Rules of the same number are the same object, so that what was set up for one can be kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache

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
Correct = Callable[[Tensor, Tensor | None], Tensor]
"""(B, V) teacher and student probabilities at the rejected position -> (B, V) weights to draw the replacement from.

The student's are None unless the rule needs them.
"""


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


@lru_cache
def top_k(k: int) -> AcceptanceRule:
    """SKD: a token stands if fewer than `k` tokens have a higher raw teacher logit (k = 0: none, k = V: all)."""

    def accept(block: Block) -> Tensor:
        drafted = block.teacher_logits_BGV.gather(-1, block.drafts_BG.unsqueeze(-1))
        return (block.teacher_logits_BGV > drafted).sum(-1) < k

    return AcceptanceRule(f"top_k({k})", accept)


@lru_cache
def everything() -> AcceptanceRule:
    """The student alone; the teacher is never asked."""
    return AcceptanceRule("everything", asks_teacher=False)


@lru_cache
def nothing() -> AcceptanceRule:
    """The teacher alone; nothing is drafted."""
    return AcceptanceRule("nothing", drafts=False)


@lru_cache
def lossless() -> AcceptanceRule:
    """Speculative decoding: the output is distributed exactly as the teacher's own."""

    def accept(block: Block) -> Tensor:
        p_BG, q_BG = _of_drafts(block)
        return block.uniforms_BG * q_BG < p_BG

    return AcceptanceRule("lossless", accept, _from_residual, needs_student_probs=True, bonus=True)


@lru_cache
def min_prob(a: float) -> AcceptanceRule:
    """A token stands if the teacher itself gives it at least probability `a`; else the teacher's most likely does."""

    def accept(block: Block) -> Tensor:
        raw_BGV = torch.softmax(block.teacher_logits_BGV.float(), dim=-1)
        return raw_BGV.gather(-1, block.drafts_BG.unsqueeze(-1)).squeeze(-1) >= a

    return AcceptanceRule(f"min_prob({a:g})", accept, _likeliest)


@lru_cache
def mixture(g: float) -> AcceptanceRule:
    """Every token is an exact sample of (1 - g) q + g p: g = 0 is the student, g = 1 the teacher."""

    def accept(block: Block) -> Tensor:
        p_BG, q_BG = _of_drafts(block)
        return block.uniforms_BG * q_BG < (1 - g) * q_BG + g * p_BG

    return AcceptanceRule(f"mixture({g:g})", accept, _from_residual, needs_student_probs=True)


def _of_drafts(block: Block) -> tuple[Tensor, Tensor]:
    """(B, G) teacher and student probabilities of the drafted tokens."""
    assert block.student_probs_BGV is not None  # noqa: S101 - the rule asks for them
    drafted = block.drafts_BG.unsqueeze(-1)
    both = (block.teacher_probs_BGV, block.student_probs_BGV)
    p_BG, q_BG = (probs_BGV.gather(-1, drafted).squeeze(-1) for probs_BGV in both)
    return p_BG, q_BG


def _likeliest(p_BV: Tensor, q_BV: Tensor | None) -> Tensor:  # noqa: ARG001 - one signature for all rules
    return torch.zeros_like(p_BV).scatter_(-1, p_BV.argmax(-1, keepdim=True), 1.0)


def _from_residual(p_BV: Tensor, q_BV: Tensor | None) -> Tensor:
    assert q_BV is not None  # noqa: S101 - the rule asks for them
    residual = (p_BV - q_BV).clamp_min(0)
    # p = q leaves no residual; a rejection is then rounding, and p is the right distribution.
    return torch.where(residual.sum(-1, keepdim=True) > 0, residual, p_BV)
