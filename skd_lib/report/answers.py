"""What the models' answers to the test set tell beyond their scores: how long they are."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from skd_lib.evaluation.predictions import read_predictions
from skd_lib.report.summary import Lengths, Role

_BINS = 16


def answer_lengths(predictions: Mapping[Role, Path]) -> dict[Role, Lengths]:
    """Lengths of each model's answers, with histograms on one scale.

    Raises:
        SkdError: a file cannot be read.
    """
    found = {role: read_predictions(path) for role, path in predictions.items()}
    longest = max((answer.tokens for answers in found.values() for answer in answers), default=0)
    edges = np.linspace(0, max(longest, 1), min(_BINS, max(longest, 1)) + 1)
    return {
        role: Lengths(
            mean=float(np.mean([answer.tokens for answer in answers])),
            longest=max(answer.tokens for answer in answers),
            truncated_fraction=float(np.mean([answer.truncated for answer in answers])),
            edges=tuple(edges.tolist()),
            counts=tuple(np.histogram([answer.tokens for answer in answers], edges)[0].tolist()),
        )
        for role, answers in found.items()
        if answers
    }
