"""From runs to what can be said of them: means over seeds, and paired tests against a comparison's reference."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

import numpy as np

from records import SCORE, Run
from skd_lib.evaluation.statistics import holm, t_interval
from study_plan import ALL_ARMS
from study_plan import TEACHER_COST as STUDY_COST
from tiny_models import forward_cost

METHODS, RULES, EQUAL = "evidence-methods", "evidence-rules", "evidence-equal"
FR_EN, FR_EN_EQUAL = "evidence-fr-en-cpu", "evidence-fr-en-equal-cpu"
_ARITHMETIC = forward_cost("teacher") / forward_cost("student")
_CUT = 134_515_008 / (134_515_008 - 8 * 3_540_096)  # parameters: SmolLM2-135M, and a layer, 8 of which are cut
_QWEN = 1_543_714_304 / 494_032_768  # parameters: Qwen2.5-Coder-1.5B and 0.5B
TEACHER_COST = {
    **dict.fromkeys((METHODS, RULES, EQUAL, "evidence-few", "evidence-poor", "evidence-again"), _ARITHMETIC),
    **dict.fromkeys((FR_EN, FR_EN_EQUAL, "evidence-fr-en-sft-cpu", "evidence-summaries-cpu"), _CUT),
    **dict.fromkeys(("qwen-gsm8k-bf16", "qwen-gsm8k-methods"), _QWEN),
    **{arm.name: STUDY_COST for arm in ALL_ARMS},
}
"""Cost of a position for the teacher, in forward passes of the student, by comparison."""


@dataclass(frozen=True)
class Mean:
    """A mean over seeds and its 95 % interval (Student's t); of one seed there is none."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class PairedTest:
    """A variant minus the reference, paired by seed: mean, 95 % interval, and p of the paired t test, two-sided."""

    difference: Mean
    p_value: float
    p_holm: float
    seeds: int


@dataclass(frozen=True)
class Variant:
    """One variant of a comparison.

    Attributes:
        name: Of the variant.
        runs: Those that ended with a model, by seed.
        test: Against the reference, where both have two seeds or more.
    """

    name: str
    runs: dict[int, Run]
    test: PairedTest | None = None

    def mean(self, figure: str) -> Mean | None:
        """Over the seeds; None where it was not measured."""
        values = [run.figures[figure] for run in self.runs.values() if figure in run.figures]
        return mean_of(values) if values else None

    def seconds(self) -> float | None:
        """Return the seconds of sampling, loss and optimiser in training."""
        phases = [self.mean(f"seconds_{phase}") for phase in ("rollout", "loss", "optimiser")]
        return sum(phase.mean for phase in phases if phase) if any(phases) else None

    def compute(self) -> float | None:
        """Return the mean of the runs' `compute_of`; None for comparisons that `TEACHER_COST` does not have."""
        values = [value for run in self.runs.values() if (value := compute_of(run)) is not None]
        return mean_of(values).mean if values else None


def compute_of(run: Run) -> float | None:
    """Return the positions processed while training, in forward passes of the student: the teacher's by its cost."""
    if (cost := TEACHER_COST.get(run.comparison)) is None or "student_tokens" not in run.figures:
        return None
    return run.figures["student_tokens"] + run.figures.get("teacher_tokens", 0.0) * cost


def trained_positions(run: Run, runs: Sequence[Run]) -> float:
    """Return the positions of a run that the backward passes went through: prompts and responses in the loss.

    Prompts are counted by the comparison's runs of SFT, whose only positions they are beside the responses.
    """
    sft = [each.figures for each in runs if (each.comparison, each.variant) == (run.comparison, "sft")]
    prompts = [(each["student_tokens"] - each["response_tokens"]) / each["steps"] for each in sft]
    return run.figures["response_tokens"] + fmean(prompts) * run.figures["steps"]


def at_equal_compute(runs: Sequence[Run], steps: str, compute: str, *, backward: float = 0.0) -> list[Variant]:
    """Return the variants of `compute` with scores interpolated at the compute of the reference, seed by seed.

    These runs were given steps for equal compute by a count that was too high for SKD. Between a seed's run in `steps`
    and its run in `compute` the score is taken to change in a straight line with compute. `backward` is what a position
    costs in the backward pass, in forward passes.
    """
    less = {(run.variant, run.seed): run for run in runs if run.comparison == steps}
    more = [run for run in runs if run.comparison == compute]
    targets = {run.seed: run for run in more if run.variant == run.reference}

    def total(run: Run) -> float:
        return (compute_of(run) or math.nan) + (backward * trained_positions(run, runs) if backward else 0.0)

    def moved(run: Run) -> Run:
        known = [less[run.variant, run.seed], run]
        costs = [total(each) for each in (*known, targets[run.seed])]
        score = np.interp(costs[-1], costs[:-1], [each.figures[SCORE] for each in known])
        return replace(run, figures={SCORE: float(score)})

    return variants_of([run if run.variant == run.reference else moved(run) for run in more], compute)


def mean_of(values: Sequence[float]) -> Mean:
    """Return the mean with its interval."""
    mean = float(np.mean(values))
    low, high = t_interval(values) if len(values) > 1 else (math.nan, math.nan)
    return Mean(mean, low, high)


def variants_of(runs: Sequence[Run], comparison: str) -> list[Variant]:
    """Return the variants of one comparison in the order of its runs, each tested against the reference by `SCORE`.

    P-values are adjusted for the number of variants of the comparison (Holm 1979).
    """
    ours = [run for run in runs if run.comparison == comparison]
    by_name: dict[str, dict[int, Run]] = {run.variant: {} for run in ours}
    for run in ours:
        if not run.failed:
            by_name[run.variant][run.seed] = run
    reference = by_name.get(ours[0].reference, {}) if ours else {}
    differences = {name: _differences(found, reference) for name, found in by_name.items()}
    tests = paired_tests({name: each for name, each in differences.items() if by_name[name] is not reference})
    return [Variant(name, found, tests.get(name)) for name, found in by_name.items()]


def paired_tests(differences: Mapping[str, Sequence[float]], family: int = 0) -> dict[str, PairedTest]:
    """Test differences over seeds against 0, where there are two or more.

    Args:
        differences: By name, one value a seed.
        family: Number of tests that Holm's correction is for, if that is more than are given.
    """
    tested = {name: values for name, values in differences.items() if len(values) > 1}
    p_values = [_p_value(values) for values in tested.values()]
    adjusted = holm(p_values + [1.0] * (family - len(p_values)))
    return {
        name: PairedTest(mean_of(values), p_value, p_holm, len(values))
        for (name, values), p_value, p_holm in zip(tested.items(), p_values, adjusted, strict=False)
    }


def p_text(p_value: float) -> str:
    """Return a p-value as tables write it."""
    return "below 0.001" if p_value < 0.001 else f"{p_value:.3f}"


def _differences(runs: dict[int, Run], reference: dict[int, Run]) -> list[float]:
    return [run.figures[SCORE] - reference[seed].figures[SCORE] for seed, run in runs.items() if seed in reference]


def _p_value(differences: Sequence[float]) -> float:
    from scipy import stats

    if np.ptp(differences) < 1e-9:  # no spread to measure the mean by: two scores out of 500 are soon the same
        return 1.0
    return float(stats.ttest_1samp(differences, 0.0).pvalue)
