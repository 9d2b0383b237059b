"""How sure a comparison is: means over seeds, and p-values of many tests at once."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from skd_lib.evaluation.significance import LEVEL


def t_interval(values: Sequence[float]) -> tuple[float, float]:
    """The 95 % confidence interval of a mean by Student's t, of at least two independent values: (low, high)."""
    from scipy import stats

    mean = float(np.mean(values))
    error = float(np.std(values, ddof=1)) / math.sqrt(len(values))
    half = float(stats.t.ppf((1 + LEVEL) / 2, len(values) - 1)) * error
    return mean - half, mean + half


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values adjusted for their number (Holm 1979), in the order given.

    Rejecting those below a level makes the probability of even one false rejection at most that level, whatever the
    tests have to do with each other.
    """
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted
