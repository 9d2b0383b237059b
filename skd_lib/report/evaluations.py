"""What `evaluate` finds about one model, as a folder, and the evaluations of two models in one folder.

EVALUATION/scores.json         role, label and scores, those of held-out sets among them
EVALUATION/predictions.jsonl   answers to the test set
EVALUATION/held_out/SET.jsonl  answers to each held-out set
EVALUATION/skd_record/         how the model was trained, where this project trained it
EVALUATIONS/ROLE/              an evaluation for each role
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skd_lib.config import parse_section
from skd_lib.errors import SkdError
from skd_lib.report.summary import ROLES, Role, Scores
from skd_lib.storage import write_text_atomic

if TYPE_CHECKING:
    from skd_lib.evaluation.evaluate import Evaluation

PREDICTIONS, SCORES, HELD_OUT = "predictions.jsonl", "scores.json", "held_out"


class RoleScores(Scores):
    """The content of `scores.json`."""

    role: Role
    label: str = ""


@dataclass(frozen=True)
class Evaluated:
    """One model's evaluation.

    Attributes:
        folder: Its files.
        role: Which model of the run it is.
        label: Which trial of a comparison the model is from; empty where there is one run only.
        scores: On the test set and the held-out sets.
    """

    folder: Path
    role: Role
    label: str
    scores: Scores

    @property
    def predictions(self) -> Path:
        """The answers to the test set."""
        return self.folder / PREDICTIONS


def write_evaluation(
    folder: Path, role: str, label: str, result: Evaluation, held_out: Mapping[str, Evaluation]
) -> None:
    """Write an evaluation's folder, all but the record of the model's training.

    Args:
        folder: Created where it is missing.
        role: See `Evaluated`.
        label: See `Evaluated`.
        result: On the test set.
        held_out: On each held-out set, by its name.
    """
    from skd_lib.evaluation.predictions import write_predictions

    (folder / HELD_OUT).mkdir(parents=True, exist_ok=True)
    write_predictions(folder / PREDICTIONS, result.predictions)
    for name, each in held_out.items():
        write_predictions(folder / HELD_OUT / f"{name}.jsonl", each.predictions)
    values: dict[str, Any] = {"role": role, "label": label, **result.scores}
    if held_out:
        values[HELD_OUT] = {name: each.scores for name, each in held_out.items()}
    write_text_atomic(folder / SCORES, json.dumps(values, indent=2) + "\n")


def read_evaluation(folder: Path) -> Evaluated:
    """Read an evaluation's scores.

    Raises:
        SkdError: the folder is not one that `evaluate` wrote.
    """
    file = folder / SCORES
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        hint = "name a folder that step `evaluate` wrote"
        raise SkdError(f"cannot be read: {error.strerror}", where=str(file), hint=hint) from error
    found = parse_section(RoleScores, text, where=str(file))
    return Evaluated(folder, found.role, found.label, found)


def read_evaluations(folder: Path) -> dict[Role, Evaluated]:
    """Read the evaluations of a folder, in the order of a run.

    Raises:
        SkdError: there is none, or one is broken.
    """
    found = {role: read_evaluation(folder / role) for role in ROLES if (folder / role).is_dir()}
    if not found:
        hint = "name a folder that step `evaluate_student` wrote"
        raise SkdError(f"there is no folder of a role ({', '.join(ROLES)})", where=str(folder), hint=hint)
    return found
