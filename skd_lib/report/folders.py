"""The folders in which steps hand on what they measured.

EVALUATION/scores.json         role, label and scores, those of held-out sets among them
EVALUATION/predictions.jsonl   answers to the test set
EVALUATION/held_out/SET.jsonl  answers to each held-out set
EVALUATION/skd_record/         how the model was trained, where this project trained it
EVALUATIONS/ROLE/              an evaluation for each role
DRAFTS/before.json, after.json label and figures of the student as draft model; without figures where not measured

The label says which trial of a comparison a model is from; it is empty where there is one run only.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skd_lib.config import parse_json, parse_section
from skd_lib.errors import SkdError
from skd_lib.results import MOMENTS, ROLES, DataUse, Moment, Role, Scores, Specdec
from skd_lib.storage import write_text_atomic

if TYPE_CHECKING:
    from skd_lib.evaluation.evaluate import Evaluation

PREDICTIONS, SCORES, HELD_OUT = "predictions.jsonl", "scores.json", "held_out"
LABEL = "label"


class RoleScores(Scores):
    """The content of `scores.json`."""

    role: Role
    label: str = ""
    model_uri: str = ""
    data: tuple[DataUse, ...] = ()


@dataclass(frozen=True)
class Evaluated:
    """One model's evaluation: its folder, and the content of its `scores.json`."""

    folder: Path
    role: Role
    label: str
    scores: RoleScores

    @property
    def predictions(self) -> Path:
        """The file of the answers to the test set."""
        return self.folder / PREDICTIONS


def write_evaluation(
    folder: Path,
    role: str,
    label: str,
    result: Evaluation,
    held_out: Mapping[str, Evaluation],
    *,
    model_uri: str = "",
    data: Sequence[DataUse] = (),
) -> None:
    """Write an evaluation's folder, all but the record of the model's training: the test set and the held-out sets.

    `data` is all that the run's steps read, so that the pipeline's record can name it though they come from the cache.
    """
    from skd_lib.evaluation.predictions import write_predictions

    (folder / HELD_OUT).mkdir(parents=True, exist_ok=True)
    write_predictions(folder / PREDICTIONS, result.predictions)
    for name, each in held_out.items():
        write_predictions(folder / HELD_OUT / f"{name}.jsonl", each.predictions)
    scores = result.scores.model_copy(update={HELD_OUT: {name: each.scores for name, each in held_out.items()}})
    used = {"model_uri": model_uri, "data": [each.model_dump() for each in data]}
    _write(folder / SCORES, {"role": role, LABEL: label, **used, **scores.flat()})


def read_evaluation(folder: Path) -> Evaluated:
    """Read an evaluation's scores; raise SkdError if the folder is not one that `evaluate` wrote."""
    file = folder / SCORES
    found = parse_section(RoleScores, read_result(file, step="evaluate"), where=str(file))
    return Evaluated(folder, found.role, found.label, found)


def read_evaluations(folder: Path) -> dict[Role, Evaluated]:
    """Read the evaluations of a folder, in the order of a run."""
    found = {role: read_evaluation(folder / role) for role in ROLES if (folder / role).is_dir()}
    if not found:
        hint = "name a folder that step `evaluate_student` wrote"
        raise SkdError(f"there is no folder of a role ({', '.join(ROLES)})", where=str(folder), hint=hint)
    return found


def write_drafts(folder: Path, label: str, results: Mapping[str, Mapping[str, Any]]) -> None:
    """Write the figures of the student as draft model, by moment; none where nothing was measured."""
    folder.mkdir(parents=True, exist_ok=True)
    for moment in MOMENTS:
        _write(folder / f"{moment}.json", {LABEL: label, **results.get(moment, {})})


def read_drafts(folder: Path) -> tuple[str, dict[Moment, Specdec]]:
    """Read the label, and the figures by moment where they were measured."""
    label, found = "", dict[Moment, Specdec]()
    for moment in MOMENTS:
        file = folder / f"{moment}.json"
        values = parse_json(read_result(file, step="specdec_benchmark"), where=str(file), plain=False)
        label = str(values.pop(LABEL, ""))
        if values:
            found[moment] = parse_section(Specdec, values, where=str(file))
    return label, found


def read_result(file: Path, *, step: str) -> str:
    """Read a file of a folder that a step wrote."""
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        hint = f"name a folder that step `{step}` wrote"
        raise SkdError(f"cannot be read: {error.strerror}", where=str(file), hint=hint) from error


def _write(file: Path, values: Mapping[str, Any]) -> None:
    write_text_atomic(file, json.dumps(values, indent=2) + "\n")
