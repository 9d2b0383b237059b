"""Divergences of the student's next-token distribution from the teacher's, at one position.

A divergence is a pure function of log-probabilities, of which some may be -inf: (log p_NE, log q_NE) -> loss_N, the sum
over E events. The events are the tokens of a vocabulary or a coarser partition of it (`teacher_signal`). `loss` sums it
over a batch without holding all the logits. `DIVERGENCES` lists them; `DIVERGENCES.add` registers another.

torch is not imported here, so that configurations are checked against the names of `DIVERGENCES` without it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from skd_lib._core.registry import Registry
from skd_lib.errors import SkdError

if TYPE_CHECKING:
    from torch import Tensor

_HEAD_MASS = 0.5
"""Share of the teacher's mass that `adaptive_kl` calls the head."""


def forward_kl(log_p_NE: Tensor, log_q_NE: Tensor) -> Tensor:
    """Return KL(p || q): infinite where q lacks an event of p, untouched by events that p lacks."""
    p_NE = log_p_NE.exp()
    return (p_NE * (log_p_NE - log_q_NE).masked_fill_(p_NE == 0, 0)).sum(-1)


def reverse_kl(log_p_NE: Tensor, log_q_NE: Tensor) -> Tensor:
    """Return KL(q || p): the student must not put mass where the teacher has none."""
    return forward_kl(log_q_NE, log_p_NE)


def jsd(log_p_NE: Tensor, log_q_NE: Tensor, beta: float = 0.5) -> Tensor:
    """Return the generalised Jensen-Shannon divergence: beta KL(p || m) + (1 - beta) KL(q || m).

    At the ends of the range the formula is 0 everywhere; as in GKD, beta = 0 then means the forward KL and beta = 1
    the reverse KL, the limits of the formula divided by beta and by 1 - beta.
    """
    if not 0 <= beta <= 1:
        raise SkdError(f"beta must be between 0 and 1, got {beta}", where="jsd")
    if beta in (0, 1):
        return (reverse_kl if beta else forward_kl)(log_p_NE, log_q_NE)
    log_m_NE = _log_mixture(beta, log_p_NE, log_q_NE)
    return beta * forward_kl(log_p_NE, log_m_NE) + (1 - beta) * forward_kl(log_q_NE, log_m_NE)


def skew_kl(log_p_NE: Tensor, log_q_NE: Tensor, alpha: float = 0.1) -> Tensor:
    """Return KL(p || alpha p + (1 - alpha) q): a forward KL that is at most -log alpha. alpha = 0 is the forward KL."""
    if not 0 <= alpha < 1:
        hint = "at 1 the divergence is 0 whatever the student does; DistiLLM uses 0.1"
        raise SkdError(f"alpha must be at least 0 and less than 1, got {alpha}", where="distill.alpha", hint=hint)
    return forward_kl(log_p_NE, _log_mixture(alpha, log_p_NE, log_q_NE) if alpha else log_q_NE)


def skew_reverse_kl(log_p_NE: Tensor, log_q_NE: Tensor, alpha: float = 0.1) -> Tensor:
    """Return KL(q || alpha q + (1 - alpha) p): a reverse KL that is at most -log alpha. alpha = 0 is the reverse KL."""
    return skew_kl(log_q_NE, log_p_NE, alpha)


def tvd(log_p_NE: Tensor, log_q_NE: Tensor) -> Tensor:
    """Return the total variation distance, 0 to 1. Its gradient does not grow with it: no single token dominates."""
    return (log_p_NE.exp() - log_q_NE.exp()).abs().sum(-1) / 2


def adaptive_kl(log_p_NE: Tensor, log_q_NE: Tensor) -> Tensor:
    """Return the forward KL where the student misses the teacher's head, the reverse KL where it misses the tail.

    Their shares, how much of sum |p - q| lies on head and tail, carry no gradient.
    """
    head_N = _head_share(log_p_NE.detach().exp(), log_q_NE.detach().exp())
    forward_N, reverse_N = head_N * forward_kl(log_p_NE, log_q_NE), (1 - head_N) * reverse_kl(log_p_NE, log_q_NE)
    # An infinite divergence of no weight does not count.
    return forward_N.masked_fill(head_N == 0, 0) + reverse_N.masked_fill(head_N == 1, 0)


def _head_share(p_NE: Tensor, q_NE: Tensor) -> Tensor:
    """Return g_h / (g_h + g_t): the share of |p - q| that lies on the teacher's head."""
    sorted_NE, order_NE = p_NE.sort(descending=True, stable=True)
    gaps_NE = (sorted_NE - q_NE.gather(-1, order_NE)).abs()
    in_head_NE = sorted_NE.cumsum(-1) - sorted_NE < _HEAD_MASS
    total_N = gaps_NE.sum(-1)
    # Where p = q both KLs are 0, and so is the loss, whatever their shares.
    return ((gaps_NE * in_head_NE).sum(-1) / total_N).where(total_N > 0, 0.5)


def _log_mixture(weight: float, log_a_NE: Tensor, log_b_NE: Tensor) -> Tensor:
    """Return log(weight a + (1 - weight) b), with a finite gradient where both are 0; there it is the least float."""
    import torch

    least = torch.finfo(log_b_NE.dtype).min
    return (log_a_NE + math.log(weight)).logaddexp((log_b_NE + math.log1p(-weight)).clamp_min(least))


@dataclass(frozen=True)
class DivergenceEntry:
    """A divergence by its name in the configuration.

    Attributes:
        function: (log p_NE, log q_NE) and the values of `settings` by name -> loss_N.
        formula: Of the teacher's p and the student's q.
        source: Paper of the divergence.
        settings: Fields of `distill` that it reads.
        arrays: fp32 arrays of a chunk's logits that forward and backward pass hold at most: a measured peak. The
            default is the most of any here.
    """

    function: Callable[..., Tensor]
    formula: str
    source: str = ""
    settings: tuple[str, ...] = ()
    arrays: int = 13

    def __str__(self) -> str:
        return self.formula


def _fields() -> Collection[str]:
    from skd_lib.config import DistillConfig

    return DistillConfig.model_fields


DIVERGENCES = Registry(
    "divergence",
    {
        "forward_kl": DivergenceEntry(forward_kl, "KL(p || q)", "Xu et al. 2025, arXiv 2410.11325", arrays=7),
        "reverse_kl": DivergenceEntry(reverse_kl, "KL(q || p)", "MiniLLM, arXiv 2306.08543", arrays=7),
        "jsd": DivergenceEntry(
            jsd,
            "beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q",
            "GKD, arXiv 2306.13649, equation 1",
            settings=("beta",),
            arrays=11,
        ),
        "skew_kl": DivergenceEntry(
            skew_kl, "KL(p || alpha p + (1 - alpha) q)", "DistiLLM, arXiv 2402.03898", settings=("alpha",), arrays=10
        ),
        "skew_reverse_kl": DivergenceEntry(
            skew_reverse_kl,
            "KL(q || alpha q + (1 - alpha) p)",
            "DistiLLM, arXiv 2402.03898",
            settings=("alpha",),
            arrays=10,
        ),
        "tvd": DivergenceEntry(tvd, "1/2 sum |p - q|", "f-distill, arXiv 2307.15190", arrays=7),
        "adaptive_kl": DivergenceEntry(
            adaptive_kl,
            "(g_h KL(p || q) + g_t KL(q || p)) / (g_h + g_t); g: sum of |p - q| over the teacher's head / tail, "
            "without gradient; the head is the fewest tokens with half of its mass",
            "AKL, arXiv 2404.02657",
            arrays=13,
        ),
    },
    section="distill",
    fields=_fields,
)
"""The divergences of `distill.divergence`."""


def divergence(name: str, **settings: Any) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the divergence of that name as a function of (log p_NE, log q_NE).

    Args:
        name: In `DIVERGENCES`.
        settings: Values of its settings (`beta` of `jsd`, `alpha` of the skewed ones), if they differ from the
            defaults; others are ignored.
    """
    entry = DIVERGENCES[name]
    return partial(entry.function, **{setting: settings[setting] for setting in entry.settings if setting in settings})
