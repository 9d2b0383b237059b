"""Results of comparisons, as CSV files that are small enough for a repository.

`runs.csv` has one row a run, `curves.csv` one row a point of a run's curves. Where a comparison has one seed,
`examples.csv` holds what can be said over the test set's examples. Tables and plots are made from these.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from skd_lib.comparison.table import Comparison, TrialResult
from skd_lib.config import parse_section
from skd_lib.errors import SkdError
from skd_lib.storage import write_text_atomic

RUNS, CURVES, EXAMPLES = "runs.csv", "curves.csv", "examples.csv"
SCORE = "score"
"""Of the task's first metric."""
NAMES = ("comparison", "metric", "variant", "reference", "init", "failed")
FIGURES = (
    *(SCORE, "teacher", "rejection_rate", "rejection_rate_last_tenth", "tokens_per_teacher_call"),
    *("draft_acceptance_rate", "draft_tokens_per_teacher_call", "steps", "best_step"),
    *("first_validation_loss", "best_validation_loss", "response_tokens", "student_tokens", "teacher_tokens"),
    *("seconds_rollout", "seconds_loss", "seconds_optimiser"),
)
RUN_COLUMNS = (*NAMES, "seed", *FIGURES)
CURVE_COLUMNS = ("comparison", "variant", "seed", "figure", "step", "value")
EXAMPLE_FIGURES = (SCORE, "low", "high", "difference", "difference_low", "difference_high", "p_value", "p_holm")
EXAMPLE_COLUMNS = ("comparison", "variant", "metric", "reference", *EXAMPLE_FIGURES)
_CURVES = {
    "rejection_rate": "steps",
    "validation_loss": "validation_steps",
}
"""The curves that are kept, and their steps; all others stay in `comparison.json`."""


@dataclass(frozen=True)
class Run:
    """One run of a comparison.

    Attributes:
        comparison: Its name.
        metric: The task's first, which the score is of.
        variant: What was compared.
        reference: What the comparison's variants are tested against.
        init: The student's init, empty where all had the same.
        failed: Why there is no model; empty where there is one.
        seed: The run's.
        figures: Those of `FIGURES` that were measured.
    """

    comparison: str
    metric: str
    variant: str
    reference: str
    init: str
    failed: str
    seed: int
    figures: dict[str, float]


@dataclass(frozen=True)
class Curve:
    """One figure of one run over the optimiser steps."""

    comparison: str
    variant: str
    seed: int
    figure: str
    steps: list[int]
    values: list[float]


@dataclass(frozen=True)
class OverExamples:
    """A variant of one seed, over the test set's examples: its score's 95 % interval, its test against the reference.

    Attributes:
        comparison: Its name.
        variant: What was compared.
        metric: The score's.
        reference: What it is tested against.
        figures: Those of `EXAMPLE_FIGURES` that were measured; the differences are variant minus reference, paired by
            example.
    """

    comparison: str
    variant: str
    metric: str
    reference: str
    figures: dict[str, float]


def collect(files: Sequence[Path], folder: Path) -> list[Path]:
    """Put comparisons into `runs.csv`, `curves.csv` and `examples.csv`; others that are there stay.

    Args:
        files: Each one's `comparison.json`.
        folder: Where to; what is there of these comparisons is replaced.

    Returns:
        What was written.

    Raises:
        SkdError: a file is missing or is none, two comparisons have one name, or the folder's files are others.
    """
    comparisons = [_read(file) for file in files]
    names = [comparison.name for comparison in comparisons]
    if len(set(names)) < len(names):
        raise SkdError(f"two comparisons have one name: {', '.join(names)}", hint="give each comparison once")
    runs = [_row(comparison, trial) for comparison in comparisons for trial in comparison.trials]
    points = [
        point for comparison in comparisons for trial in comparison.trials for point in _points(comparison, trial)
    ]
    examples = [row for comparison in comparisons for row in _over_examples(comparison)]
    written: dict[str, tuple[Sequence[str], Iterable[Mapping[str, object]]]] = {
        RUNS: (RUN_COLUMNS, runs),
        CURVES: (CURVE_COLUMNS, points),
        EXAMPLES: (EXAMPLE_COLUMNS, examples),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, (header, rows) in written.items():
            there = _rows(folder / name, set(header)) if (folder / name).is_file() else []
            kept = [row for row in there if row["comparison"] not in names]
            write_text_atomic(folder / name, _csv(header, [*kept, *rows]))
    except OSError as error:
        raise SkdError(f"cannot be written: {error.strerror}", where=str(folder), hint="name another folder") from error
    return [folder / name for name in written]


def append(file: Path, header: Sequence[str], rows: Iterable[Mapping[str, object]]) -> None:
    """Append rows to a CSV file, which is made with its header if it is not there; floats have six digits.

    A last row that was cut off in the middle of writing goes.
    """
    text = _csv(header, [{name: short(value) for name, value in row.items()} for row in rows])
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.is_file():
        there = _text(file)
        if (whole := there[: there.rfind("\n") + 1]) != there:
            write_text_atomic(file, whole)
        if whole:
            text = text.partition("\n")[2]
    with file.open("a", encoding="utf-8", newline="") as stream:
        stream.write(text)


def read_runs(folder: Path) -> list[Run]:
    """Read the runs in a folder's `runs.csv`.

    Raises:
        SkdError: there is no such file, or it is another one.
    """
    return [
        Run(
            **{name: row[name] for name in NAMES},
            seed=int(row["seed"]),
            figures={name: float(row[name]) for name in FIGURES if row[name]},
        )
        for row in _rows(folder / RUNS, set(RUN_COLUMNS))
    ]


def read_curves(folder: Path) -> list[Curve]:
    """Read the curves in a folder's `curves.csv`.

    Raises:
        SkdError: there is no such file, or it is another one.
    """
    curves: dict[tuple[str, str, int, str], Curve] = {}
    for row in _rows(folder / CURVES, set(CURVE_COLUMNS)):
        key = row["comparison"], row["variant"], int(row["seed"]), row["figure"]
        curve = curves.setdefault(key, Curve(*key, [], []))
        if curve.steps and int(row["step"]) <= curve.steps[-1]:  # the run was cut off, and run again
            curve.steps.clear()
            curve.values.clear()
        curve.steps.append(int(row["step"]))
        curve.values.append(float(row["value"]))
    return list(curves.values())


def read_examples(folder: Path) -> list[OverExamples]:
    """Read a folder's `examples.csv`.

    Raises:
        SkdError: there is no such file, or it is another one.
    """
    names = EXAMPLE_COLUMNS[: -len(EXAMPLE_FIGURES)]
    return [
        OverExamples(
            **{name: row[name] for name in names},
            figures={name: float(row[name]) for name in EXAMPLE_FIGURES if row[name]},
        )
        for row in _rows(folder / EXAMPLES, set(EXAMPLE_COLUMNS))
    ]


def _read(file: Path) -> Comparison:
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        hint = "name the `comparison.json` that `skd compare` wrote"
        raise SkdError(f"cannot be read: {error.strerror}", where=str(file), hint=hint) from error
    return parse_section(Comparison, text, where=str(file))


def _row(comparison: Comparison, trial: TrialResult) -> dict[str, object]:
    metric = comparison.metrics[0]
    flat = trial.flat()
    row = {
        **flat,
        "comparison": comparison.name,
        "metric": metric,
        "reference": comparison.reference,
        SCORE: flat.get(metric, ""),
        "teacher": comparison.teacher[metric].score if metric in comparison.teacher else "",
    }
    return {name: short(row.get(name, "")) for name in RUN_COLUMNS}


def _over_examples(comparison: Comparison) -> Iterable[dict[str, object]]:
    metric = comparison.metrics[0]
    for variant in comparison.variants:
        if variant.runs != 1 or (score := variant.scores.get(metric)) is None:
            continue
        row = {
            "comparison": comparison.name,
            "variant": variant.variant,
            "metric": metric,
            "reference": comparison.reference,
            SCORE: short(score.mean),
            "low": short(score.low),
            "high": short(score.high),
        }
        if test := variant.tests.get(metric):
            row |= {
                "difference": short(test.difference),
                "difference_low": short(test.low),
                "difference_high": short(test.high),
                "p_value": short(test.p_value),
                "p_holm": short(test.p_holm),
            }
        yield row


def _points(comparison: Comparison, trial: TrialResult) -> Iterable[dict[str, object]]:
    if trial.course is None:
        return
    for figure, steps in _CURVES.items():
        for step, value in zip(getattr(trial.course, steps), getattr(trial.course, figure), strict=True):
            named = {"comparison": comparison.name, "variant": trial.variant, "seed": trial.seed}
            yield {**named, "figure": figure, "step": step, "value": short(value)}


def short(value: Any) -> Any:
    """Return a value as the files have it."""
    return f"{value:.6g}" if isinstance(value, float) else value


def _csv(header: Sequence[str], rows: Iterable[Mapping[str, object]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, header, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _rows(file: Path, columns: set[str]) -> list[dict[str, str]]:
    """Read the rows of a file but a last one that was cut off in the middle of writing."""
    hint = "make it: `python docs/evidence/evidence.py collect`"
    try:
        text = _text(file)
    except OSError as error:
        raise SkdError(f"cannot be read: {error.strerror}", where=str(file), hint=hint) from error
    reader = csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1]))
    if missing := columns - set(reader.fieldnames or ()):
        raise SkdError(f"columns are missing: {', '.join(sorted(missing))}", where=str(file), hint=hint)
    return list(reader)


def _text(file: Path) -> str:
    with file.open(encoding="utf-8", newline="") as stream:
        return stream.read()
