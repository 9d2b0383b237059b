"""What the models' answers to the test set tell beyond their scores: how long they are, and which model is better."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from skd_lib.config import MetricName
from skd_lib.evaluation.predictions import Prediction, compare
from skd_lib.report.summary import Comparison, Lengths, Role

PAIRS: tuple[tuple[Role, Role], ...] = (
    ("student_after", "student_before"),
    ("student_after", "teacher"),
    ("teacher", "teacher_base"),
)
"""The questions of a distillation: did it help, how far is it from the teacher, had the teacher learned the task."""
_BINS = 16


def answer_lengths(predictions: Mapping[Role, Sequence[Prediction]]) -> dict[Role, Lengths]:
    """Lengths of each model's answers, with histograms on one scale."""
    longest = max((answer.tokens for answers in predictions.values() for answer in answers), default=0)
    edges = np.linspace(0, max(longest, 1), min(_BINS, max(longest, 1)) + 1)
    return {
        role: Lengths(
            mean=float(np.mean([answer.tokens for answer in answers])),
            longest=max(answer.tokens for answer in answers),
            truncated_fraction=float(np.mean([answer.truncated for answer in answers])),
            edges=tuple(edges.tolist()),
            counts=tuple(np.histogram([answer.tokens for answer in answers], edges)[0].tolist()),
        )
        for role, answers in predictions.items()
        if answers
    }


def comparisons(predictions: Mapping[Role, Sequence[Prediction]], metrics: Sequence[MetricName]) -> list[Comparison]:
    """Paired tests of the pairs that both answered, for each metric.

    Raises:
        SkdError: two models answered different examples.
    """
    return [
        Comparison(
            a=a,
            b=b,
            metric=metric,
            difference=found.difference,
            low=found.low,
            high=found.high,
            p_value=found.p_value,
            n=len(predictions[a]),
        )
        for a, b in PAIRS
        if predictions.get(a) and predictions.get(b)
        for metric, found in compare(predictions[a], predictions[b], metrics).items()
    ]
