"""From runs to what can be said of them: means over seeds, and paired tests against a comparison's reference."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from records import SCORE, Run
from skd_lib.evaluation.statistics import holm, t_interval
from tiny_models import forward_cost

METHODS, RULES, EQUAL = "evidence-methods", "evidence-rules", "evidence-equal"
FR_EN, FR_EN_EQUAL = "evidence-fr-en-cpu", "evidence-fr-en-equal-cpu"
_ARITHMETIC = forward_cost("teacher") / forward_cost("student")
_CUT = 134_515_008 / (134_515_008 - 8 * 3_540_096)  # parameters: SmolLM2-135M, and a layer, 8 of which are cut
TEACHER_COST = {
    **dict.fromkeys((METHODS, RULES, EQUAL, "evidence-few", "evidence-poor", "evidence-again"), _ARITHMETIC),
    **dict.fromkeys((FR_EN, FR_EN_EQUAL, "evidence-fr-en-sft-cpu", "evidence-summaries-cpu"), _CUT),
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
        """Positions processed while training, in forward passes of the student: the teacher's count by its cost.

        None for comparisons that `TEACHER_COST` does not have.
        """
        student, teacher = self.mean("student_tokens"), self.mean("teacher_tokens")
        costs = {TEACHER_COST.get(run.comparison) for run in self.runs.values()}
        if student is None or len(costs) != 1 or (cost := costs.pop()) is None:
            return None
        return student.mean + (teacher.mean if teacher else 0.0) * cost


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
    tested = [name for name, values in differences.items() if len(values) > 1 and by_name[name] is not reference]
    p_values = [_p_value(differences[name]) for name in tested]
    tests = {
        name: PairedTest(mean_of(differences[name]), p_value, p_holm, len(differences[name]))
        for name, p_value, p_holm in zip(tested, p_values, holm(p_values), strict=True)
    }
    return [Variant(name, found, tests.get(name)) for name, found in by_name.items()]


def _differences(runs: dict[int, Run], reference: dict[int, Run]) -> list[float]:
    return [run.figures[SCORE] - reference[seed].figures[SCORE] for seed, run in runs.items() if seed in reference]


def _p_value(differences: Sequence[float]) -> float:
    from scipy import stats

    if np.ptp(differences) == 0:  # all the same: no spread to measure the mean by
        return 1.0 if differences[0] == 0 else 0.0
    return float(stats.ttest_1samp(differences, 0.0).pvalue)
