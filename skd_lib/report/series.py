"""Long series made short for charts and tables."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from statistics import fmean
from typing import TypeVar

POINTS = 400
"""More points than a chart has room for; a pipeline parameter has room for several such curves."""
_T = TypeVar("_T")


def groups(values: Sequence[_T], count: int) -> list[Sequence[_T]]:
    """Split values into at most `count` groups of nearly equal size, in order."""
    count = min(count, len(values))
    edges = [round(i * len(values) / count) for i in range(count + 1)] if count else [0]
    return [values[start:end] for start, end in itertools.pairwise(edges)]


def thinned(steps: Sequence[_T], values: Sequence[float], points: int = POINTS) -> tuple[list[_T], list[float]]:
    """Return at most `points` points of a curve: each the mean of its neighbours, at the last one's step."""
    if len(values) <= points:
        return list(steps), list(values)
    return [group[-1] for group in groups(steps, points)], [fmean(group) for group in groups(values, points)]


def smoothed(values: Sequence[float], window: int) -> list[float]:
    """Return means over `window` neighbours, fewer at the ends."""
    half = window // 2
    return [fmean(values[max(0, i - half) : i + half + 1]) for i in range(len(values))]


def spread(values: Sequence[_T], count: int) -> list[_T]:
    """Return at most `count` values, evenly spread, with the first and the last."""
    if len(values) <= count:
        return list(values)
    return [values[round(i * (len(values) - 1) / (count - 1))] for i in range(count)]
