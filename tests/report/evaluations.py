"""Folders as the steps `evaluate` and `scores` leave them, for tests of the steps that read them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from skd_lib.evaluation.predictions import Prediction, write_predictions
from skd_lib.report.folders import PREDICTIONS, SCORES


def evaluation(
    folder: Path, role: str, scores: Mapping[str, Any], answers: Sequence[Prediction] = (), label: str = ""
) -> Path:
    """Write one model's evaluation."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / SCORES).write_text(json.dumps({"role": role, "label": label, **scores}))
    write_predictions(folder / PREDICTIONS, answers)
    return folder


def evaluations(folder: Path, scores: Mapping[str, Mapping[str, Any]], answers: Sequence[Prediction] = ()) -> Path:
    """Write the evaluations of several models, by role."""
    for role, found in scores.items():
        evaluation(folder / role, role, found, answers)
    return folder
