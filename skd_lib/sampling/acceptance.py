"""Acceptance rules: they decide which drafted tokens stand, and what replaces the first one that does not.

One engine with another rule is another algorithm. `RULES` lists the rules of interleaved sampling; `student_only` is
student generation, `teacher_only` teacher generation. p and q are the teacher's and the student's distributions after
temperature and top-p, unless a rule says otherwise.

Each function keeps what it returned: a sampler that was set up for a rule serves all later calls with the same numbers.
torch is not imported here, so that configurations are checked against the names of `RULES` without it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING

from skd_lib._core.registry import Registry

if TYPE_CHECKING:
    from torch import Tensor

    from skd_lib.config import SamplingParams


@dataclass(frozen=True)
class Block:
    """One drafted block, as a rule sees it.

    Attributes:
        drafts_BG: Drafted tokens.
        teacher_logits_BGV: Raw teacher logits at the drafted positions, before temperature, top-p or anything else.
        student_probs_BGV: The distributions the drafts were drawn from; None unless the rule needs them.
        uniforms_BG: One uniform number for each drafted token.
        teacher_params: Temperature and top-p of the teacher.
    """

    drafts_BG: Tensor
    teacher_logits_BGV: Tensor
    student_probs_BGV: Tensor | None
    uniforms_BG: Tensor
    teacher_params: SamplingParams

    @cached_property
    def teacher_probs_BGV(self) -> Tensor:  # noqa: N802
        """The teacher's distributions after its temperature and top-p."""
        from skd_lib.sampling.distributions import warp

        return warp(self.teacher_logits_BGV, self.teacher_params)


Accept = Callable[[Block], "Tensor"]
"""Returns (B, G) bool: is each drafted token accepted, given that all before it are?"""
Correct = Callable[["Tensor", "Tensor | None"], "Tensor"]
"""(B, V) teacher and student probabilities at the rejected position -> (B, V) weights to draw the replacement from.

The student's are None unless the rule needs them.
"""


@dataclass(frozen=True)
class AcceptanceRule:
    """A rule with its numbers.

    Attributes:
        name: For messages.
        accept: None if no token is tested, because the student does not draft or the teacher is not asked.
        correct: Weights of the replacement; None samples it from the teacher's distribution.
        drafts: True if the student drafts.
        asks_teacher: True if the teacher scores the drafts.
        needs_student_probs: True if `accept` and `correct` read the student's distributions.
        bonus: True if the teacher adds a token of its own after a block that was accepted whole.
        numbers: The rule's numbers.
    """

    name: str
    accept: Accept | None = None
    correct: Correct | None = None
    drafts: bool = True
    asks_teacher: bool = True
    needs_student_probs: bool = False
    bonus: bool = False
    numbers: tuple[float, ...] = ()


@lru_cache
def top_k(k: int) -> AcceptanceRule:
    """Accept a token if fewer than `k` tokens have a higher raw teacher logit (k = 0: none, k = V: all)."""

    def accept(block: Block) -> Tensor:
        drafted = block.teacher_logits_BGV.gather(-1, block.drafts_BG.unsqueeze(-1))
        return (block.teacher_logits_BGV > drafted).sum(-1) < k

    return AcceptanceRule(f"top_k({k})", accept, numbers=(k,))


@lru_cache
def student_only() -> AcceptanceRule:
    """Let the student write alone; the teacher is never asked."""
    return AcceptanceRule("student_only", asks_teacher=False)


@lru_cache
def teacher_only() -> AcceptanceRule:
    """Let the teacher write alone; the student drafts nothing."""
    return AcceptanceRule("teacher_only", drafts=False)


@lru_cache
def lossless() -> AcceptanceRule:
    """Decode speculatively: the output is distributed exactly as the teacher's own."""

    def accept(block: Block) -> Tensor:
        p_BG, q_BG = _of_drafts(block)
        return block.uniforms_BG * q_BG < p_BG

    return AcceptanceRule("lossless", accept, _from_residual, needs_student_probs=True, bonus=True)


@lru_cache
def min_prob(a: float) -> AcceptanceRule:
    """Accept a token that has at least probability `a` before the teacher's temperature and top-p."""

    def accept(block: Block) -> Tensor:
        raw_BGV = block.teacher_logits_BGV.float().softmax(-1)
        return raw_BGV.gather(-1, block.drafts_BG.unsqueeze(-1)).squeeze(-1) >= a

    return AcceptanceRule(f"min_prob({a:g})", accept, _teacher_argmax, numbers=(a,))


@lru_cache
def mixture(g: float) -> AcceptanceRule:
    """Make every token an exact sample of (1 - g) q + g p: g = 0 is the student, g = 1 the teacher."""

    def accept(block: Block) -> Tensor:
        p_BG, q_BG = _of_drafts(block)
        return block.uniforms_BG * q_BG < (1 - g) * q_BG + g * p_BG

    return AcceptanceRule(f"mixture({g:g})", accept, _from_residual, needs_student_probs=True)


def _of_drafts(block: Block) -> tuple[Tensor, Tensor]:
    """Return (B, G) teacher and student probabilities of the drafted tokens."""
    assert block.student_probs_BGV is not None  # noqa: S101 - the rule asks for them
    drafted = block.drafts_BG.unsqueeze(-1)
    both = (block.teacher_probs_BGV, block.student_probs_BGV)
    p_BG, q_BG = (probs_BGV.gather(-1, drafted).squeeze(-1) for probs_BGV in both)
    return p_BG, q_BG


def _teacher_argmax(p_BV: Tensor, q_BV: Tensor | None) -> Tensor:  # noqa: ARG001 - one signature for all rules
    return p_BV.new_zeros(p_BV.shape).scatter_(-1, p_BV.argmax(-1, keepdim=True), 1.0)


def _from_residual(p_BV: Tensor, q_BV: Tensor | None) -> Tensor:
    assert q_BV is not None  # noqa: S101 - the rule asks for them
    residual = (p_BV - q_BV).clamp_min(0)
    # p = q leaves no residual; a rejection is then rounding, and p is the right distribution.
    return residual.where(residual.sum(-1, keepdim=True) > 0, p_BV)


@dataclass(frozen=True)
class RuleEntry:
    """An acceptance rule by its name in the configuration.

    Attributes:
        make: Takes the values of `settings`, at an optimiser step; returns the rule.
        accepts: The condition by which a drafted token t stands.
        replaces: The replacement of the first token that does not stand.
        source: Paper of the rule.
        settings: Fields of `distill.sampling` that it reads besides `gamma`.
    """

    make: Callable[..., AcceptanceRule]
    accepts: str
    replaces: str
    source: str = ""
    settings: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.accepts}, else {self.replaces}"


def _fields() -> Collection[str]:
    from skd_lib.config import InterleavedConfig

    return InterleavedConfig.model_fields


RULES = Registry(
    "acceptance rule",
    {
        "top_k": RuleEntry(
            top_k,
            accepts="fewer than K = `top_k` tokens have a higher raw teacher logit",
            replaces="sample p",
            source="SKD, Xu et al. 2025, arXiv 2410.11325",
            settings=("top_k",),
        ),
        "min_prob": RuleEntry(
            min_prob,
            accepts="p(t) >= `min_prob`, before temperature and top-p",
            replaces="argmax p",
            source="CA-OPD, arXiv 2609.02401",
            settings=("min_prob",),
        ),
        "mixture": RuleEntry(
            mixture,
            accepts="u < 1 - g + g p(t)/q(t), g = `mixture`",
            replaces="sample max(p - q, 0)",
            source="IPD: tokens are exact samples of (1 - g) q + g p",
            settings=("mixture",),
        ),
        "lossless": RuleEntry(
            lossless,
            accepts="u < p(t)/q(t)",
            replaces="sample max(p - q, 0)",
            source="speculative decoding, Leviathan et al. 2023, arXiv 2211.17192: samples of the teacher",
        ),
    },
    section="distill.sampling",
    fields=_fields,
)
"""The rules of `distill.sampling.rule`; `RULES.add` registers another."""
