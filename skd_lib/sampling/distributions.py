"""From logits to probabilities to a token.

A token is drawn by inverting the cumulative distribution at one uniform number. The numbers belong to a row and a
position, not to a call, so that what a row samples does not depend on the batch it is in or on how its tokens are
grouped into blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from skd_lib.config import SamplingParams

_NUCLEUS_GUESS = 512
"""Most nuclei are far smaller than the vocabulary: look among this many tokens before sorting all of them."""


def warp(logits: Tensor, params: SamplingParams) -> Tensor:
    """Probabilities after temperature and top-p.

    Args:
        logits: (..., V) raw logits of any float dtype.
        params: Temperature 0 gives the one-hot distribution of the argmax.

    Returns:
        (..., V) fp32 probabilities that sum to 1.
    """
    if params.temperature == 0:
        return torch.zeros_like(logits, dtype=torch.float32).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
    probs = torch.softmax(logits.float() / params.temperature, dim=-1)
    return probs if params.top_p >= 1 else _nucleus(probs, params.top_p)


def draw(probs: Tensor, uniforms: Tensor) -> Tensor:
    """The token at which the cumulative distribution passes `uniforms`.

    Args:
        probs: (..., V) weights, not necessarily normalised; at least one is positive.
        uniforms: (...) numbers in [0, 1).

    Returns:
        (...) token ids; a token of probability 0 is never drawn.
    """
    # fp32 sums over a large vocabulary would lose the tail; MPS has no float64.
    precise = torch.float32 if probs.device.type == "mps" else torch.float64
    cumulative = probs.cumsum(-1, dtype=precise)
    total = cumulative[..., -1:]
    target = torch.minimum(uniforms.to(precise).unsqueeze(-1) * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, target, right=True).squeeze(-1)


def row_uniforms(seed: int, length: int, channels: int) -> Tensor:
    """The uniform numbers of one row: (length, channels) float64 on the CPU, a function of `seed` alone."""
    return torch.rand(length, channels, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _nucleus(probs: Tensor, top_p: float) -> Tensor:
    """Keep the smallest set of likeliest tokens whose mass reaches `top_p`, renormalised."""
    vocabulary = probs.shape[-1]
    values, tokens = probs.topk(min(_NUCLEUS_GUESS, vocabulary))
    if values.shape[-1] < vocabulary and bool((values.sum(-1) < top_p).any()):
        values, tokens = probs.sort(descending=True, stable=True)
    mass_before = values.cumsum(-1) - values
    kept = torch.where(mass_before < top_p, values, 0.0)
    return torch.zeros_like(probs).scatter_(-1, tokens, kept / kept.sum(-1, keepdim=True))
