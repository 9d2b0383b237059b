"""The table of a comparison: its figures, as `comparison.json` holds them, and how the trials' results become one.

A variant's scores are means over its seeds with intervals; each variant is tested against the reference.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, Literal, TypeVar

import numpy as np
from pydantic import ConfigDict, Field

from skd_lib._core.documents import read_text
from skd_lib.comparison.trials import Trial
from skd_lib.config import MetricName, Section, parse_section
from skd_lib.distillation.divergences import DIVERGENCES
from skd_lib.errors import SkdError
from skd_lib.evaluation.predictions import Prediction, compare, read_predictions
from skd_lib.evaluation.statistics import holm, t_interval
from skd_lib.models.records import read_record
from skd_lib.report.course import TRAINING_PHASES
from skd_lib.report.folders import Evaluated, read_drafts, read_evaluation
from skd_lib.results import Course, Difference, Score, Scores, Specdec, rounded

COMPARISON = "comparison.json"
IntervalKind = Literal["t over seeds", "bootstrap over examples", ""]
"""The second includes Wilson's intervals of accuracies."""
SHOWN_VARIANTS = 24
"""On Kubeflow's page for comparing runs, where each figure is a row."""
COSTS = ("rejection_rate", "tokens_per_teacher_call", "response_tokens", "student_tokens", "teacher_tokens", "steps")
LOSS_SETTINGS = ("temperature", "temperature_squared", "selective", "replaced_weight", "teacher_signal")
"""Of section `distill`: what changes the loss but is not the divergence's own."""
_T = TypeVar("_T")
Answers = Mapping[tuple[str, int], Sequence[Prediction]]


class SkippedTrial(Trial):
    """A trial without a model."""

    reason: str = Field(description="Why.")


class TableConfig(Section):
    """The trials that the table is to hold."""

    model_config = ConfigDict(extra="ignore")

    reference: str = Field("", description="The variant that the others are tested against; empty: the first.")
    trials: list[Trial] = Field([], description="In the order of the table; without or with those that were skipped.")
    skipped: list[SkippedTrial] = Field([], description="Those that were not run.")


class TrialResult(Section):
    """One run: a variant with one seed."""

    variant: str
    seed: int
    init: str = ""
    reason: str = Field("", description="Why it failed; empty where it did not.")
    scores: Scores | None = None
    rejection_rate: float | None = Field(None, description="Mean over the steps; none where no token was tested.")
    tokens_per_teacher_call: float | None = Field(None, description="In the last tenth of the steps.")
    draft: dict[str, float] = Field({}, description="As draft: acceptance rate, tokens per teacher call, speed-up.")
    acceptance_by_position: tuple[float, ...] = Field((), description="As draft, by position in the block.")
    objective: str = Field("", description="The loss that was minimised; losses of others are not comparable.")
    figures: dict[str, float] = Field({}, description="The training's: steps, tokens, seconds, validation loss.")
    course: Course | None = Field(None, description="The training's curves: losses, rejection rate, lengths by step.")

    def flat(self) -> dict[str, Any]:
        """Return one row of a table."""
        row: dict[str, Any] = {"variant": self.variant, "seed": self.seed, "init": self.init, "failed": self.reason}
        for name, score in (self.scores.by_name() if self.scores else {}).items():
            row |= {name: score.score, f"{name}_low": score.low, f"{name}_high": score.high}
        sampling = self.model_dump(include={"rejection_rate", "tokens_per_teacher_call"}, exclude_none=True)
        return {**row, **sampling, **{f"draft_{name}": value for name, value in self.draft.items()}, **self.figures}


class VariantScore(Section):
    """A variant's score: the mean over its seeds, with its interval."""

    mean: float
    low: float
    high: float
    kind: IntervalKind = Field("", description="The 95 % interval is about new trainings, or about new examples.")
    caution: str = Field("", description="Why the interval is not to be relied on; empty where it is.")
    runs: int


class VariantTest(Difference):
    """A variant against the reference, paired by example and seed."""

    p_holm: float | None = Field(None, description="Adjusted for the number of variants tested by this metric.")
    examples: int
    seeds: int = Field(description="Seeds that both have; the test rests on these alone.")


class VariantResult(Section):
    """One variant, over its seeds."""

    variant: str
    runs: int = Field(description="Runs that ended with a model.")
    failed: int
    scores: dict[str, VariantScore] = Field(description="By metric; those of a held-out set as SET.METRIC.")
    tests: dict[str, VariantTest] = Field({}, description="By metric, on the test set.")
    draft: dict[str, float] = Field({}, description="Means over the runs, as draft of the teacher.")
    costs: dict[str, float] = Field({}, description="Means over the runs: rejection rate, tokens, steps, seconds.")

    def means(self) -> dict[str, float]:
        """Return all means by name."""
        scores = {metric: score.mean for metric, score in self.scores.items()}
        return scores | {f"draft_{name}": value for name, value in self.draft.items()} | self.costs


class Comparison(Section):
    """A whole comparison."""

    name: str
    reference: str
    metrics: list[str] = Field(description="The task's, the one that matters first.")
    teacher: dict[str, Score] = Field({}, description="The fine-tuned teacher's scores, by metric.")
    variants: list[VariantResult]
    trials: list[TrialResult]

    def headline(self) -> dict[str, float]:
        """Return the means, flat, for trackers: `skd/chrf`, `skd/rejection_rate`, ..."""
        return {f"{each.variant}/{name}": value for each in self.variants for name, value in each.means().items()}

    def figures(self) -> dict[str, float]:
        """Return the means by which Kubeflow's page compares runs: of the first variants, by task metric and as drafts.

        Rounded, and few enough to be kept with every node of the run.
        """
        return {
            f"{each.variant}/{name}": rounded(means[name])
            for each in self.variants[:SHOWN_VARIANTS]
            for means in [each.means()]
            for name in (*self.metrics[:1], "draft_speedup")
            if math.isfinite(means.get(name, math.nan))
        }

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values; what is not known is left out."""
        return self.model_dump(mode="json", exclude_none=True)

    def to_json(self) -> str:
        """Return the content of `comparison.json`."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def read(cls, path: Path) -> Comparison:
        """Read `comparison.json`; raise OSError where there is no such file, SkdError where it is not a comparison."""
        return parse_section(cls, read_text(path), where=str(path))


def collect(
    table: TableConfig, evaluations: Sequence[Path], drafts: Sequence[Path]
) -> tuple[list[TrialResult], dict[tuple[str, int], list[Prediction]]]:
    """Put together the results of each trial, by the label that each folder holds.

    Trials without a model are at the end; the students' answers come with them. Raises SkdError for a folder that is
    broken, or belongs to no trial.
    """
    found = {each.label: each for each in map(read_evaluation, evaluations)}
    known = {trial.label for trial in table.trials}
    if unknown := sorted(found.keys() - known):
        raise SkdError(
            f"an evaluation is of trial `{unknown[0]}`, which the comparison does not have",
            where=str(found[unknown[0]].folder),
            hint=f"its trials are: {', '.join(sorted(known)) or 'none'}",
        )
    measured = {label: found["after"] for label, found in map(read_drafts, drafts) if "after" in found}
    done = [trial for trial in table.trials if trial.label in found]
    known_ends = found.keys() | {trial.label for trial in table.skipped}
    lost = [trial for trial in table.trials if trial.label not in known_ends]
    results = [
        *(trial_result(trial, found[trial.label], measured.get(trial.label)) for trial in done),
        *(_without_model(trial, "no evaluation of its student came to the table") for trial in lost),
        *(_without_model(trial, trial.reason) for trial in table.skipped),
    ]
    answers = {(trial.variant, trial.seed): read_predictions(found[trial.label].predictions) for trial in done}
    return results, answers


def trial_result(trial: Trial, evaluated: Evaluated, draft: Specdec | None) -> TrialResult:
    """Put together the results of one trial: its student's evaluation, the training's record there, and the draft."""
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
        draft={} if draft is None else draft.figures(),
        acceptance_by_position=() if draft is None else tuple(draft.acceptance_by_position),
        objective=_objective(record.lineage, trial),
        figures=numbers,
        course=record.course,
    )


def _objective(lineage: Mapping[str, Any], trial: Trial) -> str:
    """Return the loss in words, with its settings."""
    if "method" not in lineage:
        return ""
    if "divergence" not in lineage:
        return "cross-entropy"
    name = str(lineage["divergence"])
    entry = DIVERGENCES.get(name)
    settings = {each: lineage[each] for each in (entry.settings if entry else ()) if each in lineage}
    own = {path.removeprefix("distill."): value for path, value in trial.overrides.items()}
    settings |= {path: value for path, value in own.items() if path.split(".")[0] in LOSS_SETTINGS}
    return ", ".join([name, *(f"{each} {value}" for each, value in settings.items())])


def _without_model(trial: Trial, reason: str) -> TrialResult:
    return TrialResult(variant=trial.variant, seed=trial.seed, init=trial.init, reason=reason)


def build_comparison(
    *,
    name: str,
    reference: str,
    metrics: Sequence[str],
    trials: Sequence[TrialResult],
    answers: Answers,
    teacher: Mapping[str, Score],
    resamples: int = 1000,
    seed: int = 0,
) -> Comparison:
    """Put all runs together, failed ones too."""
    names = list(dict.fromkeys(trial.variant for trial in trials))
    tests = _tests(names, reference, answers, resamples=resamples, seed=seed)
    variants = [
        _variant(variant, [trial for trial in trials if trial.variant == variant], tests.get(variant, {}))
        for variant in names
    ]
    return Comparison(
        name=name,
        reference=reference,
        metrics=list(metrics),
        teacher=dict(teacher),
        variants=variants,
        trials=list(trials),
    )


def _variant(name: str, trials: Sequence[TrialResult], tests: Mapping[str, VariantTest]) -> VariantResult:
    done = [trial for trial in trials if trial.scores is not None]
    scores = _collected(trial.scores.by_name() for trial in done if trial.scores)
    return VariantResult(
        variant=name,
        runs=len(done),
        failed=len(trials) - len(done),
        scores={metric: estimate(found) for metric, found in scores.items()},
        tests=dict(tests),
        draft={figure: float(np.mean(values)) for figure, values in _collected(trial.draft for trial in done).items()},
        costs={cost: float(np.mean(values)) for cost, values in _collected(map(_costs, done)).items()},
    )


def _collected(rows: Iterable[Mapping[str, _T]]) -> dict[str, list[_T]]:
    """Collect the values of each name over the rows."""
    found: dict[str, list[_T]] = {}
    for row in rows:
        for name, value in row.items():
            found.setdefault(name, []).append(value)
    return found


def estimate(scores: Sequence[Score]) -> VariantScore:
    """Return the mean over runs: by Student's t over the seeds where these differ, else by the runs' own intervals."""
    values = [score.score for score in scores]
    mean = float(np.mean(values))
    if len(set(values)) == 1:
        low, high = min(score.low for score in scores), max(score.high for score in scores)
        caution = next((score.caution for score in scores if score.caution), "")
        return VariantScore(
            mean=mean, low=low, high=high, kind="bootstrap over examples", caution=caution, runs=len(scores)
        )
    low, high = t_interval(values)
    return VariantScore(mean=mean, low=low, high=high, kind="t over seeds", runs=len(scores))


def _costs(trial: TrialResult) -> dict[str, float]:
    known = trial.flat()
    costs = {name: float(known[name]) for name in COSTS if name in known}
    return costs | {"seconds": sum(trial.figures.get(phase, 0.0) for phase in TRAINING_PHASES)}


def _tests(
    names: Sequence[str], reference: str, answers: Answers, *, resamples: int, seed: int
) -> dict[str, dict[str, VariantTest]]:
    """Test every variant against the reference, by metric; p-values are adjusted metric by metric."""
    found: dict[str, dict[MetricName, tuple[Difference, int]]] = {}
    common: dict[str, list[int]] = {}
    for name in names:
        seeds = [at for variant, at in answers if variant == name and (reference, at) in answers]
        if name != reference and seeds:
            ours, theirs = ([answers[variant, at] for at in seeds] for variant in (name, reference))
            found[name], common[name] = compare(ours, theirs, resamples=resamples, seed=seed), seeds
    tests: dict[str, dict[str, VariantTest]] = {name: {} for name in found}
    for metric in dict.fromkeys(metric for each in found.values() for metric in each):
        compared = {name: each[metric] for name, each in found.items() if metric in each}
        p_values = {name: each.p_value for name, (each, _) in compared.items() if each.p_value is not None}
        adjusted = dict(zip(p_values, holm(list(p_values.values())), strict=True))
        for name, (difference, examples) in compared.items():
            more = {"p_holm": adjusted.get(name), "examples": examples, "seeds": len(common[name])}
            tests[name][metric] = VariantTest(**difference.model_dump(), **more)
    return tests
