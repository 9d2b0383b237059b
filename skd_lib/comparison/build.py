"""From the runs of a comparison to its table: means over seeds, intervals, and tests against the reference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from skd_lib.comparison.result import Comparison, Estimate, Test, TrialResult, VariantResult
from skd_lib.comparison.statistics import holm, t_interval
from skd_lib.config import MetricName
from skd_lib.evaluation.predictions import Prediction, compare_trainings
from skd_lib.evaluation.significance import Comparison as Difference
from skd_lib.report.summary import Score

COSTS = ("rejection_rate", "tokens_per_teacher_call", "response_tokens", "student_tokens", "teacher_tokens", "steps")
TRAINING_PHASES = ("seconds_rollout", "seconds_loss", "seconds_optimiser")
Answers = Mapping[tuple[str, int], Sequence[Prediction]]
"""Predictions of each run that has a model, by variant and seed."""


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
    """Put the runs together.

    Args:
        name: Of the comparison.
        reference: The variant that the others are tested against.
        metrics: The task's metrics.
        trials: All runs, failed ones too.
        answers: What the runs' students answered on the test set.
        teacher: The teacher's scores.
        resamples: Of the paired bootstrap.
        seed: Of the paired bootstrap.

    Raises:
        SkdError: two runs answered different examples.
    """
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


def _variant(name: str, trials: Sequence[TrialResult], tests: Mapping[str, Test]) -> VariantResult:
    scored: dict[str, list[Score]] = {}
    costs: dict[str, list[float]] = {}
    drafts: dict[str, list[float]] = {}
    done = [trial for trial in trials if trial.scores is not None]
    for trial in done:
        assert trial.scores is not None  # noqa: S101 - see above
        for place, found in {"": trial.scores, **trial.scores.held_out}.items():
            for metric, score in found.metrics.items():
                scored.setdefault(f"{place}.{metric}" if place else metric, []).append(score)
        for cost, value in _costs(trial).items():
            costs.setdefault(cost, []).append(value)
        for figure, value in trial.draft.items():
            drafts.setdefault(figure, []).append(value)
    return VariantResult(
        variant=name,
        runs=len(done),
        failed=len(trials) - len(done),
        scores={metric: estimate(scores) for metric, scores in scored.items()},
        tests=dict(tests),
        draft={figure: float(np.mean(values)) for figure, values in drafts.items()},
        costs={cost: float(np.mean(values)) for cost, values in costs.items()},
    )


def estimate(scores: Sequence[Score]) -> Estimate:
    """Return the mean over runs: by Student's t over the seeds where these differ, else by the runs' own intervals."""
    values = [score.score for score in scores]
    mean = float(np.mean(values))
    if len(set(values)) == 1:
        low, high = min(score.low for score in scores), max(score.high for score in scores)
        caution = next((score.caution for score in scores if score.caution), "")
        return Estimate(
            mean=mean, low=low, high=high, kind="bootstrap over examples", caution=caution, runs=len(scores)
        )
    low, high = t_interval(values)
    return Estimate(mean=mean, low=low, high=high, kind="t over seeds", runs=len(scores))


def _costs(trial: TrialResult) -> dict[str, float]:
    known = trial.flat()
    costs = {name: float(known[name]) for name in COSTS if name in known}
    return costs | {"seconds": sum(trial.figures.get(phase, 0.0) for phase in TRAINING_PHASES)}


def _tests(
    names: Sequence[str], reference: str, answers: Answers, *, resamples: int, seed: int
) -> dict[str, dict[str, Test]]:
    """Every variant against the reference, by metric; p-values adjusted metric by metric."""
    found: dict[str, dict[MetricName, tuple[Difference, int]]] = {}
    common: dict[str, list[int]] = {}
    for name in names:
        seeds = [at for variant, at in answers if variant == name and (reference, at) in answers]
        if name != reference and seeds:
            ours, theirs = ([answers[variant, at] for at in seeds] for variant in (name, reference))
            found[name], common[name] = compare_trainings(ours, theirs, resamples=resamples, seed=seed), seeds
    tests: dict[str, dict[str, Test]] = {name: {} for name in found}
    for metric in dict.fromkeys(metric for each in found.values() for metric in each):
        compared = {name: each[metric] for name, each in found.items() if metric in each}
        p_values = {name: each.p_value for name, (each, _) in compared.items() if each.p_value is not None}
        adjusted = dict(zip(p_values, holm(list(p_values.values())), strict=True))
        for name, (difference, examples) in compared.items():
            tests[name][metric] = Test(
                difference=difference.difference,
                low=difference.low,
                high=difference.high,
                p_value=difference.p_value,
                p_holm=adjusted.get(name),
                examples=examples,
                seeds=len(common[name]),
            )
    return tests
