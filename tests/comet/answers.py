"""Answers of four models to a few examples, among them nasty ones, as `evaluate` keeps them; there is no champion."""

from pathlib import Path

from skd_lib.evaluation.predictions import Prediction, write_predictions

EXAMPLES = [("a", "ouvrir le fichier", "open the file"), ("b", "fermer la porte", "close the door"), ("c", "x", "save")]
ANSWERS = {
    "teacher_base": ["open file", "", "<script>alert(1)</script>"],
    "teacher": ["open the file", "close the door", "save"],
    "student_before": ["file" * 25_000, "close \ud800 door", "the page"],
    "student_after": ["open the file", "close the door", ""],
    "champion": [],
}


def write_answers(folder: Path) -> dict[str, Path]:
    """The files, by the names of the step's options."""
    files = {}
    for role, texts in ANSWERS.items():
        files[role] = folder / f"{role}.jsonl"
        rows = [Prediction(*example, text, 3, False) for example, text in zip(EXAMPLES, texts, strict=bool(texts))]
        write_predictions(files[role], rows)
    return files
