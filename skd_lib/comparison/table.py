"""From what the steps of a comparison wrote for each trial to the rows of its table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

from pydantic import ConfigDict, Field

from skd_lib.comparison.result import TrialResult
from skd_lib.comparison.trials import Trial
from skd_lib.config import Section
from skd_lib.errors import SkdError
from skd_lib.evaluation.predictions import Prediction, read_predictions
from skd_lib.models.records import read_record
from skd_lib.report.drafts import read_drafts
from skd_lib.report.evaluations import Evaluated, read_evaluation

Answers = dict[tuple[str, int], list[Prediction]]
"""A student's answers to the test set, by variant and seed."""


class SkippedTrial(Trial):
    """A trial without a model."""

    reason: str = Field(description="Why.")


class TableConfig(Section):
    """What the table is to hold."""

    model_config = ConfigDict(extra="ignore")

    reference: str = Field("", description="The variant that the others are tested against; empty: the first.")
    trials: list[Trial] = Field([], description="In the order of the table; without or with those that were skipped.")
    skipped: list[SkippedTrial] = Field([], description="Those that were not run.")


def collect(
    table: TableConfig, evaluations: Sequence[Path], drafts: Sequence[Path]
) -> tuple[list[TrialResult], Answers]:
    """Put together what was measured of each trial, by the label that each folder holds.

    Args:
        table: The comparison.
        evaluations: A folder of step `evaluate` for each student, in any order.
        drafts: A folder of step `specdec_benchmark` for each, in any order; those without figures count as none.

    Returns:
        A result for each trial, those without a model at the end, and the students' answers.

    Raises:
        SkdError: a folder is broken, or belongs to no trial.
    """
    found = {each.label: each for each in map(read_evaluation, evaluations)}
    known = {trial.label for trial in table.trials}
    if unknown := sorted(found.keys() - known):
        raise SkdError(
            f"an evaluation is of trial `{unknown[0]}`, which the comparison does not have",
            where=str(found[unknown[0]].folder),
            hint=f"its trials are: {', '.join(sorted(known)) or 'none'}",
        )
    figures = {
        label: measured["after"].figures() for label, measured in map(read_drafts, drafts) if "after" in measured
    }
    done = [trial for trial in table.trials if trial.label in found]
    told = found.keys() | {trial.label for trial in table.skipped}
    lost = [trial for trial in table.trials if trial.label not in told]
    results = [
        *(trial_result(trial, found[trial.label], figures.get(trial.label, {})) for trial in done),
        *(_without_model(trial, "no evaluation of its student came to the table") for trial in lost),
        *(_without_model(trial, trial.reason) for trial in table.skipped),
    ]
    answers = {(trial.variant, trial.seed): read_predictions(found[trial.label].predictions) for trial in done}
    return results, answers


def trial_result(trial: Trial, evaluated: Evaluated, draft: Mapping[str, float]) -> TrialResult:
    """Put together what one trial came to.

    Args:
        trial: The trial.
        evaluated: Its student's evaluation, which holds the record of its training.
        draft: Figures of its student as a draft model; none where that was not measured.
    """
    record = read_record(evaluated.folder)
    numbers = dict(record.figures)
    rates = record.course.rejection_rate
    return TrialResult(
        variant=trial.variant,
        seed=trial.seed,
        init=trial.init,
        scores=evaluated.scores,
        rejection_rate=fmean(rates) if rates else None,
        tokens_per_teacher_call=numbers.pop("tokens_per_teacher_call_last_tenth", None),
        draft=dict(draft),
        figures=numbers,
        course=record.course,
    )


def _without_model(trial: Trial, reason: str) -> TrialResult:
    return TrialResult(variant=trial.variant, seed=trial.seed, init=trial.init, reason=reason)
