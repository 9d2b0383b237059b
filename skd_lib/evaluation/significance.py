"""How far a score, or a difference of two scores, could be chance: bootstrap resampling of sentences.

Each resample draws as many sentences as the corpus has, with replacement, and scores their summed statistics (Koehn
2004, "Statistical significance tests for machine translation evaluation").
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from skd_lib.evaluation.metrics import FloatArray, Measured

LEVEL = 0.95


@dataclass(frozen=True)
class Comparison:
    """Two models' answers to the same examples, compared by one metric.

    Attributes:
        difference: First score minus second.
        low, high: 95 % interval of the difference.
        p_value: Two-sided: how often chance alone would make a difference as large as this.
    """

    difference: float
    low: float
    high: float
    p_value: float


def bootstrap_interval(measured: Measured, *, resamples: int = 1000, seed: int = 0) -> tuple[float, float]:
    """The 95 % percentile interval of a corpus score: (low, high), 0 to 100."""
    low, high = _percentiles(_bootstrap_scores(measured, resamples, seed))
    return low, high


def paired_bootstrap(first: Measured, second: Measured, *, resamples: int = 1000, seed: int = 0) -> Comparison:
    """Compare two models measured by one metric on the same examples in the same order.

    Both are scored on the same resamples, so that easy and hard examples cancel out. The p-value counts the resamples
    whose difference, centred at 0 as the null hypothesis has it, is at least as large as the observed one.
    """
    if first.statistics_NS.shape != second.statistics_NS.shape or first.signature != second.signature:
        raise ValueError("a paired test needs one metric and the same examples")
    difference = first.score - second.score
    differences_R = _bootstrap_scores(first, resamples, seed) - _bootstrap_scores(second, resamples, seed)
    as_large = np.abs(differences_R - differences_R.mean()) >= abs(difference)
    low, high = _percentiles(differences_R)
    return Comparison(difference, low, high, (int(as_large.sum()) + 1) / (resamples + 1))


def _bootstrap_scores(measured: Measured, resamples: int, seed: int) -> FloatArray:
    sentences = len(measured.statistics_NS)
    draws = _draws(sentences, resamples, seed)
    return np.array([measured.corpus_score(counts_N @ measured.statistics_NS) for counts_N in draws])


def _draws(sentences: int, resamples: int, seed: int) -> Iterator[FloatArray]:
    """How often each sentence is drawn, resample by resample: the same for every corpus of this size."""
    generator = np.random.default_rng(seed)
    for _ in range(resamples):
        drawn = generator.integers(sentences, size=sentences)
        yield np.bincount(drawn, minlength=sentences).astype(np.float64)


def _percentiles(values_R: FloatArray) -> tuple[float, float]:
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(values_R, [tail, 1 - tail])
    return float(low), float(high)
