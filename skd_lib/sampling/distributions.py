"""Probabilities from logits, and a token drawn from them.

A token is drawn by inverting the cumulative distribution at one uniform number. The numbers belong to a row and a
position, not to a call, so that what a row samples does not depend on the batch it is in or on how its tokens are
grouped into blocks.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from skd_lib.config import SamplingParams
from skd_lib.config.distill import LEAST_TEMPERATURE
from skd_lib.errors import SkdError

_NUCLEUS_GUESS = 512
"""Most nuclei are far smaller than the vocabulary: look among this many tokens before sorting all of them."""

_DRAW_BLOCK = 256
"""Tokens whose mass is added up before the cumulative sum: a long running sum is slow, on a GPU above all."""


_ABOVE_ALL = 0x7F800000
"""Bits of infinity."""


def check_params(params: SamplingParams, *, where: str) -> None:
    """Refuse a temperature or top-p that gives no probabilities."""
    temperature, top_p = params.temperature, params.top_p
    if temperature != 0 and not LEAST_TEMPERATURE <= temperature < math.inf:
        hint = f"give it 0, for greedy decoding, or a number from {LEAST_TEMPERATURE:g} on"
        raise SkdError(f"`temperature` is {temperature:g}", where=where, hint=hint)
    if not 0 < top_p <= 1:
        raise SkdError(f"`top_p` is {top_p:g}", where=where, hint="give it a number above 0 and up to 1")


def warp(logits: Tensor, params: SamplingParams) -> Tensor:
    """Return probabilities after temperature and top-p.

    Args:
        logits: (..., V) raw logits of any float dtype.
        params: Temperature 0 gives the one-hot distribution of the argmax. Top-p keeps the smallest set of most likely
            tokens with at least that mass; tokens as likely as its last one stay as well, so that no order among
            equals (bfloat16 logits are often equal) decides.

    Returns:
        (..., V) fp32 probabilities that sum to 1.
    """
    if params.temperature == 0:
        return torch.zeros_like(logits, dtype=torch.float32).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
    probs = torch.softmax(logits.float() / params.temperature, dim=-1)
    if params.top_p >= 1:
        return probs
    least = _least_in_nucleus(probs, params.top_p)
    kept = torch.where(probs >= least, probs, 0.0)
    return kept / kept.sum(-1, keepdim=True)


def draw(probs: Tensor, uniforms: Tensor) -> Tensor:
    """Return the token at which the cumulative distribution passes `uniforms`.

    Args:
        probs: (..., V) weights, not necessarily normalised; at least one is positive.
        uniforms: (...) numbers in [0, 1).

    Returns:
        (...) token ids; a token of probability 0 is never drawn.
    """
    # fp32 sums over a large vocabulary would lose the tail; MPS has no float64.
    precise = torch.float32 if probs.device.type == "mps" else torch.float64
    missing = -probs.shape[-1] % _DRAW_BLOCK
    padded = F.pad(probs, (0, missing)) if missing else probs  # `pad` copies even where it adds nothing
    blocks = padded.reshape(*probs.shape[:-1], -1, _DRAW_BLOCK)
    mass = blocks.sum(-1, dtype=precise)
    block, rest = _locate(mass, uniforms.to(precise).unsqueeze(-1) * mass.sum(-1, keepdim=True))
    inside = blocks.gather(-2, block.unsqueeze(-1).expand(*block.shape, _DRAW_BLOCK)).squeeze(-2)
    token, _ = _locate(inside.to(precise), rest)
    # Not beyond the last, even where the weights are NaN: on a GPU that would end the process.
    return (block * _DRAW_BLOCK + token).squeeze(-1).clamp_(max=probs.shape[-1] - 1)


def row_uniforms(seed: int, length: int, channels: int) -> Tensor:
    """Return the uniform numbers of one row: (length, channels) float64 on the CPU, a function of `seed` alone."""
    # numpy's generator, since torch's on the CPU reads only 32 bits of its seed.
    return torch.from_numpy(np.random.default_rng(seed % 2**64).random((length, channels)))


def _locate(weights: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Return the (..., 1) index of the positive weight in whose share `target` falls, and how far into it."""
    cumulative = weights.cumsum(-1)
    target = torch.minimum(target, torch.nextafter(cumulative[..., -1:], torch.zeros_like(target)))
    # NaN is beyond the last.
    index = torch.searchsorted(cumulative, target, right=True).clamp_(max=weights.shape[-1] - 1)
    return index, target - (cumulative.gather(-1, index) - weights.gather(-1, index))


def _least_in_nucleus(probs: Tensor, top_p: float) -> Tensor:
    """Return the (..., 1) smallest probability in the nucleus."""
    if probs.device.type != "cpu":
        return by_bisection(probs, top_p)
    values = probs.topk(min(_NUCLEUS_GUESS, probs.shape[-1])).values
    if values.shape[-1] < probs.shape[-1] and bool((values.sum(-1) < top_p).any()):
        values = probs.sort(descending=True).values
    inside = (values.cumsum(-1) - values < top_p).sum(-1, keepdim=True)
    return values.gather(-1, inside - 1)


def by_bisection(probs: Tensor, top_p: float) -> Tensor:
    """Do the same without sorting, and without asking the device how far to look.

    The bits of positive floats are ordered as the floats are: 31 halvings find the largest value above which, itself
    included, at least `top_p` lies.
    """
    bits = probs.view(torch.int32)
    low = torch.zeros_like(bits[..., :1])
    high = torch.full_like(low, _ABOVE_ALL)
    for _ in range(31):
        middle = low + (high - low) // 2
        enough = torch.where(bits >= middle, probs, 0.0).sum(-1, keepdim=True) >= top_p
        low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
    return low.view(torch.float32)
