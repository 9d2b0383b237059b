"""How far the student is from the teacher, token by token, without ever holding all the logits.

A divergence is a function of two blocks of logits. The losses of a batch are computed on the head's side: from the
final hidden states at response positions, in chunks whose logits are thrown away and computed again in the backward
pass, so that memory does not grow with sequence length times vocabulary.

Sources: forward KL as in Xu et al. 2025 (arXiv 2410.11325, section 3); the generalised Jensen-Shannon divergence as
in GKD (Agarwal et al. 2024, arXiv 2306.13649, equation 1 and section 2).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from skd_lib.errors import SkdError
from skd_lib.models.heads import lm_logits, vocabulary_size

_CHUNK_ELEMENTS = 2**26
"""Logits a chunk may hold: 256 MiB in fp32."""


@dataclass(frozen=True)
class Divergence:
    """A divergence between the teacher's distribution p and the student's q, computed from logits.

    Attributes:
        name: As in the configuration.
        of_log_probs: (log p_NV, log q_NV) -> loss_N, sums over V.
    """

    name: str
    of_log_probs: Callable[[Tensor, Tensor], Tensor]

    def __call__(self, teacher_logits_NV: Tensor, student_logits_NV: Tensor, temperature: float = 1.0) -> Tensor:
        """Loss of each position.

        Args:
            teacher_logits_NV: Raw teacher logits.
            student_logits_NV: Raw student logits. Where the two vocabularies are padded to different sizes the
                common rows are compared, which gives the extra ids probability 0.
            temperature: Divides both logits; there is no factor for its square.

        Returns:
            loss_N in fp32, or in float64 if both inputs are.
        """
        return self.of_log_probs(*log_probs(teacher_logits_NV, student_logits_NV, temperature))


def log_probs(teacher_logits_NV: Tensor, student_logits_NV: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probabilities of teacher and student over their common rows, in fp32 (float64 if both inputs are)."""
    rows = min(teacher_logits_NV.shape[-1], student_logits_NV.shape[-1])
    precise = {teacher_logits_NV.dtype, student_logits_NV.dtype} == {torch.float64}
    dtype = torch.float64 if precise else torch.float32
    log_p_NV, log_q_NV = (
        F.log_softmax(logits_NV[..., :rows].to(dtype) / temperature, dim=-1)
        for logits_NV in (teacher_logits_NV, student_logits_NV)
    )
    return log_p_NV, log_q_NV


def _kl(log_a_NV: Tensor, log_b_NV: Tensor) -> Tensor:
    """KL(a || b) of each position."""
    return (log_a_NV.exp() * (log_a_NV - log_b_NV)).sum(-1)


forward_kl = Divergence("forward_kl", _kl)
"""KL(p || q): the student must put mass wherever the teacher does. Xu et al.'s main choice."""

reverse_kl = Divergence("reverse_kl", lambda log_p_NV, log_q_NV: _kl(log_q_NV, log_p_NV))
"""KL(q || p): the student must not put mass where the teacher has none."""


def jsd(beta: float) -> Divergence:
    """Generalised Jensen-Shannon divergence: beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q.

    At the ends of the range the formula is 0 everywhere; as in GKD, beta = 0 then means the forward KL and beta = 1
    the reverse KL, the limits of the formula divided by beta and by 1 - beta.

    Raises:
        SkdError: beta is not between 0 and 1.
    """
    if not 0 <= beta <= 1:
        raise SkdError(f"beta must be between 0 and 1, got {beta}", where="jsd")
    if beta in (0, 1):
        return Divergence(f"jsd({beta:g})", reverse_kl.of_log_probs if beta else forward_kl.of_log_probs)

    def of_log_probs(log_p_NV: Tensor, log_q_NV: Tensor) -> Tensor:
        log_m_NV = torch.logaddexp(log_p_NV + math.log(beta), log_q_NV + math.log1p(-beta))
        return beta * _kl(log_p_NV, log_m_NV) + (1 - beta) * _kl(log_q_NV, log_m_NV)

    return Divergence(f"jsd({beta:g})", of_log_probs)


def divergence(name: str, beta: float = 0.5) -> Divergence:
    """The divergence of that name; `beta` belongs to `jsd`.

    Raises:
        SkdError: there is none of that name.
    """
    makers: dict[str, Callable[[], Divergence]] = {
        "forward_kl": lambda: forward_kl,
        "reverse_kl": lambda: reverse_kl,
        "jsd": lambda: jsd(beta),
    }
    if name not in makers:
        raise SkdError(f"unknown divergence {name!r}", hint=f"choose one of {', '.join(sorted(makers))}")
    return makers[name]()


class LossSums(NamedTuple):
    """Sums over N response positions.

    Attributes:
        loss: With its graph; divide it by the response tokens of the optimiser step.
        entropies: In nats, detached: `student`, and `teacher` where there is one.
    """

    loss: Tensor
    entropies: dict[str, Tensor]


def distillation_loss(
    student: PreTrainedModel,
    student_states_NH: Tensor,
    teacher: PreTrainedModel,
    teacher_states_NH: Tensor,
    divergence: Divergence,
    temperature: float = 1.0,
    chunk: int | None = None,
) -> LossSums:
    """Sum of a divergence over response positions, from final hidden states.

    Args:
        student: Its head makes the student's logits; gradients flow to the states and to the head.
        student_states_NH: Student states that predict the N response tokens.
        teacher: Its head makes the teacher's logits, without gradient.
        teacher_states_NH: Teacher states at the same positions; H may differ.
        divergence: What is summed.
        temperature: Divides both logits; the entropies are those of the divided logits.
        chunk: Positions whose logits are held at once; by default as many as fit into 256 MiB in fp32.

    Returns:
        Sums over the N positions; N = 0 gives 0 with a graph to every parameter involved.
    """

    def of_chunk(student_chunk_NH: Tensor, teacher_chunk_NH: Tensor) -> LossSums:
        with torch.no_grad():
            teacher_logits_NV = lm_logits(teacher, teacher_chunk_NH)
        log_p_NV, log_q_NV = log_probs(teacher_logits_NV, lm_logits(student, student_chunk_NH), temperature)
        loss = divergence.of_log_probs(log_p_NV, log_q_NV).sum()
        return LossSums(loss, {"student": _entropy_sum(log_q_NV), "teacher": _entropy_sum(log_p_NV)})

    size = chunk or _chunk_size(student, teacher)
    return _sum_over_chunks(of_chunk, (student_states_NH, teacher_states_NH.detach()), size)


def cross_entropy_sum(
    student: PreTrainedModel, student_states_NH: Tensor, targets_N: Tensor, chunk: int | None = None
) -> LossSums:
    """Sum of the cross-entropy over response positions, from final hidden states.

    Args:
        student: Its head makes the logits.
        student_states_NH: States that predict the N response tokens.
        targets_N: The response tokens.
        chunk: Positions whose logits are held at once; by default as many as fit into 256 MiB in fp32.

    Returns:
        Sums over the N positions; N = 0 gives 0 with a graph to every parameter involved.
    """

    def of_chunk(student_chunk_NH: Tensor, targets_chunk_N: Tensor) -> LossSums:
        logits_NV = lm_logits(student, student_chunk_NH)
        log_q_NV = F.log_softmax(logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32)), dim=-1)
        loss = -log_q_NV.gather(-1, targets_chunk_N.unsqueeze(-1)).sum()
        return LossSums(loss, {"student": _entropy_sum(log_q_NV)})

    return _sum_over_chunks(of_chunk, (student_states_NH, targets_N), chunk or _chunk_size(student))


def _chunk_size(*models: PreTrainedModel) -> int:
    return max(1, _CHUNK_ELEMENTS // max(vocabulary_size(model) for model in models))


def _entropy_sum(log_probs_NV: Tensor) -> Tensor:
    detached_NV = log_probs_NV.detach()
    return -(detached_NV.exp() * detached_NV).sum()


def _sum_over_chunks(of_chunk: Callable[..., LossSums], inputs: tuple[Tensor, ...], size: int) -> LossSums:
    """Add up `of_chunk` over chunks of positions; with more than one, logits are recomputed in the backward pass."""
    chunks = list(zip(*(torch.split(tensor, size) for tensor in inputs), strict=True))
    if len(chunks) == 1:
        return of_chunk(*chunks[0])
    parts = [checkpoint(of_chunk, *chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks]
    entropies = {name: torch.stack([part.entropies[name] for part in parts]).sum() for name in parts[0].entropies}
    return LossSums(torch.stack([part.loss for part in parts]).sum(), entropies)
