"""Signs of a training that goes wrong, read from what was logged: broken steps, and responses of the wrong length.

All of it is a function of the logged history, which is part of a checkpoint: a resumed run judges as an uninterrupted
one does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, median

_LOSSES = 50
_LOSSES_NEEDED = 10
"""How many of the latest losses make the median, and how many there must be before it says anything."""
_RESPONSES = 10
"""Steps whose responses are compared: so many of the first with as many of the last."""

History = Sequence[Mapping[str, float]]


def skipped_steps(history: History) -> tuple[int, int]:
    """Optimiser steps that were skipped: in all, and in a row up to the last."""
    counts = [entry["skipped_steps"] for entry in history if "skipped_steps" in entry]
    total = int(counts[-1]) if counts else 0
    # The count grows by one at each skipped step: the row is as long as the count has been growing.
    row = 0
    for before, after in zip([0, *counts][-2::-1], counts[::-1], strict=True):
        if after == before:
            break
        row += 1
    return total, row


def broken_step(loss: float, grad_norm: float, history: History, explosion_factor: float) -> str:
    """Why an optimiser step must not be taken; empty if it may.

    Args:
        loss: The step's loss.
        grad_norm: The norm of its gradient before clipping.
        history: What was logged of the steps before.
        explosion_factor: The loss may be so many times the median of the latest good steps' losses.
    """
    if not math.isfinite(loss):
        return f"the loss is {loss}"
    if not math.isfinite(grad_norm):
        return f"the norm of the gradient is {grad_norm}"
    losses = [entry["loss"] for entry in history if "loss" in entry and math.isfinite(entry["loss"])][-_LOSSES:]
    if len(losses) >= _LOSSES_NEEDED and loss > explosion_factor * (usual := median(losses)) > 0:
        return f"the loss is {loss:.4g}, {loss / usual:.0f} times the median of the last {len(losses)} steps"
    return ""


def response_trouble(history: History) -> str:
    """What has become of the lengths of sampled responses; empty if nothing that needs telling.

    Explosion: nearly all are cut at the limit, which was not so at the start. Collapse: nearly all end at once.
    """
    sampled = [entry for entry in history if "response_length_mean" in entry]
    if len(sampled) < 2 * _RESPONSES:
        return ""
    first, last = sampled[:_RESPONSES], sampled[-_RESPONSES:]

    def means(figure: str) -> tuple[float, float]:
        return fmean(entry[figure] for entry in first), fmean(entry[figure] for entry in last)

    cut_before, cut_now = means("truncated_fraction")
    if cut_now > 0.9 and cut_before < 0.5:
        return (
            f"responses no longer end: {cut_now:.0%} of the last {_RESPONSES} steps' were cut at max_new_tokens, "
            f"{cut_before:.0%} at the start. Lower the learning rate, or use a smaller top_k or more ground truth, "
            "which hold the student to what ends"
        )
    length_before, length_now = means("response_length_mean")
    if length_now < 1.5 and length_before > 3:
        return (
            f"responses have collapsed to {length_now:.1f} tokens on average, from {length_before:.1f} at the start: "
            "the student ends at once. Lower the learning rate, or use a smaller top_k or more ground truth"
        )
    return ""
