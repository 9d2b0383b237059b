"""How far the student is from the teacher at one position: divergences between two distributions.

A divergence is a pure function of log-probabilities, of which some may be -inf. It does not care whether its events are
the tokens of a vocabulary or a coarser partition of it (`teacher_signal`). `loss` sums it over a batch without holding
all the logits.

=====================  ===========================================================  ==================================
name                   of the teacher's p and the student's q                       source
=====================  ===========================================================  ==================================
`forward_kl`           KL(p || q)                                                   Xu et al. 2025 (arXiv 2410.11325)
`reverse_kl`           KL(q || p)                                                   MiniLLM (arXiv 2306.08543)
`jsd(beta)`            beta KL(p || m) + (1 - beta) KL(q || m),                     GKD (arXiv 2306.13649, section 2)
                       m = beta p + (1 - beta) q
`skew_kl(alpha)`       KL(p || alpha p + (1 - alpha) q)                             DistiLLM (arXiv 2402.03898)
`skew_reverse_kl(a)`   KL(q || alpha q + (1 - alpha) p)                             DistiLLM (arXiv 2402.03898)
`tvd`                  1/2 sum |p - q|                                              f-distill (arXiv 2307.15190)
`adaptive_kl`          (g_h KL(p || q) + g_t KL(q || p)) / (g_h + g_t)              AKL (arXiv 2404.02657)
=====================  ===========================================================  ==================================
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import assert_never

import torch
import torch.nn.functional as F
from torch import Tensor

from skd_lib.config import DivergenceName
from skd_lib.errors import SkdError

_HEAD_MASS = 0.5
"""Share of the teacher's mass that `adaptive_kl` calls the head."""


@dataclass(frozen=True)
class Divergence:
    """A divergence between the teacher's distribution p and the student's q.

    Attributes:
        name: As in the configuration.
        of_log_probs: (log p_NE, log q_NE) -> loss_N, sums over E events.
    """

    name: str
    of_log_probs: Callable[[Tensor, Tensor], Tensor] = field(repr=False)

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


def _kl(log_a_NE: Tensor, log_b_NE: Tensor) -> Tensor:
    """KL(a || b) of each position: infinite where b lacks an event of a, untouched by events that a lacks."""
    a_NE = log_a_NE.exp()
    return (a_NE * (log_a_NE - log_b_NE).masked_fill_(a_NE == 0, 0)).sum(-1)


def _reverse(log_p_NE: Tensor, log_q_NE: Tensor) -> Tensor:
    return _kl(log_q_NE, log_p_NE)


forward_kl = Divergence("forward_kl", _kl)
"""KL(p || q): the student must put mass wherever the teacher does. Xu et al.'s main choice."""

reverse_kl = Divergence("reverse_kl", _reverse)
"""KL(q || p): the student must not put mass where the teacher has none."""

tvd = Divergence("tvd", lambda log_p_NE, log_q_NE: (log_p_NE.exp() - log_q_NE.exp()).abs().sum(-1) / 2)
"""Total variation distance, 0 to 1. Its gradient does not grow with the distance: no single token dominates."""


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
        return Divergence(f"jsd({beta:g})", _reverse if beta else _kl)

    def of_log_probs(log_p_NE: Tensor, log_q_NE: Tensor) -> Tensor:
        log_m_NE = _log_mixture(beta, log_p_NE, log_q_NE)
        return beta * _kl(log_p_NE, log_m_NE) + (1 - beta) * _kl(log_q_NE, log_m_NE)

    return Divergence(f"jsd({beta:g})", of_log_probs)


def skew_kl(alpha: float) -> Divergence:
    """KL(p || alpha p + (1 - alpha) q): a forward KL that is at most -log alpha. alpha = 0 is the forward KL.

    Raises:
        SkdError: alpha is not at least 0 and less than 1.
    """
    _check_skew("skew_kl", alpha)
    if alpha == 0:
        return Divergence("skew_kl(0)", _kl)
    return Divergence(
        f"skew_kl({alpha:g})",
        lambda log_p_NE, log_q_NE: _kl(log_p_NE, _log_mixture(alpha, log_p_NE, log_q_NE)),
    )


def skew_reverse_kl(alpha: float) -> Divergence:
    """KL(q || alpha q + (1 - alpha) p): a reverse KL that is at most -log alpha. alpha = 0 is the reverse KL.

    Raises:
        SkdError: alpha is not at least 0 and less than 1.
    """
    _check_skew("skew_reverse_kl", alpha)
    if alpha == 0:
        return Divergence("skew_reverse_kl(0)", _reverse)
    return Divergence(
        f"skew_reverse_kl({alpha:g})",
        lambda log_p_NE, log_q_NE: _kl(log_q_NE, _log_mixture(alpha, log_q_NE, log_p_NE)),
    )


def _adaptive(log_p_NE: Tensor, log_q_NE: Tensor) -> Tensor:
    head_N = _head_share(log_p_NE.detach().exp(), log_q_NE.detach().exp())
    forward_N, reverse_N = head_N * _kl(log_p_NE, log_q_NE), (1 - head_N) * _reverse(log_p_NE, log_q_NE)
    # An infinite divergence of no weight does not count.
    return forward_N.masked_fill(head_N == 0, 0) + reverse_N.masked_fill(head_N == 1, 0)


def _head_share(p_NE: Tensor, q_NE: Tensor) -> Tensor:
    """g_h / (g_h + g_t): how much of |p - q| lies on the teacher's head, the fewest events with half of its mass."""
    sorted_NE, order_NE = p_NE.sort(descending=True, stable=True)
    gaps_NE = (sorted_NE - q_NE.gather(-1, order_NE)).abs()
    in_head_NE = sorted_NE.cumsum(-1) - sorted_NE < _HEAD_MASS
    total_N = gaps_NE.sum(-1)
    # Where p = q both KLs are 0, and so is the loss, whatever their shares.
    return torch.where(total_N > 0, (gaps_NE * in_head_NE).sum(-1) / total_N, 0.5)


adaptive_kl = Divergence("adaptive_kl", _adaptive)
"""Forward KL where the student misses the teacher's head, reverse KL where it misses the tail; the shares, how much of
sum |p - q| lies on head (the fewest tokens with half of the teacher's mass) and tail, carry no gradient."""


def divergence(name: DivergenceName, *, beta: float = 0.5, alpha: float = 0.1) -> Divergence:
    """The divergence of that name; `beta` belongs to `jsd`, `alpha` to `skew_kl` and `skew_reverse_kl`."""
    match name:
        case "forward_kl":
            return forward_kl
        case "reverse_kl":
            return reverse_kl
        case "jsd":
            return jsd(beta)
        case "skew_kl":
            return skew_kl(alpha)
        case "skew_reverse_kl":
            return skew_reverse_kl(alpha)
        case "tvd":
            return tvd
        case "adaptive_kl":
            return adaptive_kl
        case _:
            assert_never(name)


def _check_skew(name: str, alpha: float) -> None:
    if not 0 <= alpha < 1:
        hint = "at 1 the divergence is 0 whatever the student does; DistiLLM uses 0.1"
        raise SkdError(f"alpha must be at least 0 and less than 1, got {alpha}", where=name, hint=hint)


def _log_mixture(weight: float, log_a_NE: Tensor, log_b_NE: Tensor) -> Tensor:
    """log(weight a + (1 - weight) b), with a finite gradient where both are 0; there it is the least float."""
    least = torch.finfo(log_b_NE.dtype).min
    return torch.logaddexp(log_a_NE + math.log(weight), (log_b_NE + math.log1p(-weight)).clamp_min(least))
