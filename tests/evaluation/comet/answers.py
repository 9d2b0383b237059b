"""Answers of four models to a few examples, among them nasty ones, as `evaluate` keeps them; there is no champion."""

import json
from pathlib import Path

from skd_lib.evaluation.predictions import Prediction, write_predictions
from skd_lib.report.folders import PREDICTIONS, SCORES
from skd_lib.report.measured import CHAMPION

EXAMPLES = [("a", "ouvrir le fichier", "open the file"), ("b", "fermer la porte", "close the door"), ("c", "x", "save")]
ANSWERS = {
    "teacher_base": ["open file", "", "<script>alert(1)</script>"],
    "teacher": ["open the file", "close the door", "save"],
    "student_before": ["file" * 25_000, "close \ud800 door", "the page"],
    "student_after": ["open the file", "close the door", ""],
}


def write_answers(folder: Path) -> dict[str, Path]:
    """Return the folders, by the names of the step's options."""
    champion = folder / "champion"
    champion.mkdir(exist_ok=True)
    (champion / CHAMPION).write_text("{}")
    folders = {"champion": champion}
    for role, texts in ANSWERS.items():
        name = f"{role.partition('_')[0]}_evaluations"
        folders[name] = folder / name
        (folders[name] / role).mkdir(parents=True, exist_ok=True)
        (folders[name] / role / SCORES).write_text(json.dumps({"role": role}))
        rows = [Prediction(*example, text, 3, False) for example, text in zip(EXAMPLES, texts, strict=True)]
        write_predictions(folders[name] / role / PREDICTIONS, rows)
    return folders
