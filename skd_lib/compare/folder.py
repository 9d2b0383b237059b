"""One run of a comparison as a folder: its figures, and its student's answers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from skd_lib.compare.result import TrialResult
from skd_lib.config import parse_section
from skd_lib.errors import SkdError
from skd_lib.evaluation.predictions import Prediction, read_predictions, write_predictions
from skd_lib.storage import write_text_atomic

RESULT, PREDICTIONS = "result.json", "predictions.jsonl"


def write_result(folder: Path, result: TrialResult, answers: Sequence[Prediction]) -> None:
    """Write a run's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    write_predictions(folder / PREDICTIONS, answers)
    write_text_atomic(folder / RESULT, result.model_dump_json(indent=2) + "\n")


def read_result(folder: Path) -> tuple[TrialResult, list[Prediction]]:
    """A run's figures, and its student's answers to the test set.

    Raises:
        SkdError: one of the two files is missing or is none.
    """
    file = folder / RESULT
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        hint = "name a folder that step `compare_result` wrote"
        raise SkdError(f"cannot be read: {error.strerror}", where=str(file), hint=hint) from error
    return parse_section(TrialResult, text, where=str(file)), read_predictions(folder / PREDICTIONS)
