"""Long series of figures made short: for a parameter that Kubeflow hands on, for a chart, for a line of bars."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from statistics import fmean
from typing import TypeVar

POINTS = 400
"""More points than a chart has room for; and a pipeline parameter has room for several curves of so many."""
T = TypeVar("T")


def groups(values: Sequence[T], count: int) -> list[Sequence[T]]:
    """Values in at most `count` groups of nearly equal size, in order."""
    count = min(count, len(values))
    edges = [round(i * len(values) / count) for i in range(count + 1)] if count else [0]
    return [values[start:end] for start, end in itertools.pairwise(edges)]


def thinned(steps: Sequence[int], values: Sequence[float], points: int = POINTS) -> tuple[list[int], list[float]]:
    """At most `points` points of a curve: each the mean of its neighbours, at the last one's step."""
    if len(values) <= points:
        return list(steps), list(values)
    return [group[-1] for group in groups(steps, points)], [fmean(group) for group in groups(values, points)]


def smoothed(values: Sequence[float], window: int) -> list[float]:
    """Means over `window` neighbours, fewer at the ends."""
    half = window // 2
    return [fmean(values[max(0, i - half) : i + half + 1]) for i in range(len(values))]
