"""From the stored results of the convergence study to its claims and rules, as tables and as plots."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

import numpy as np

from analysis import PairedTest, mean_of, p_text, paired_tests
from plots import plot
from records import SCORE, Curve, Run
from skd_lib._core.format import markdown_table
from study_plan import (
    AGAIN,
    AGAIN_SEEDS,
    ARMS,
    CLAIMS,
    CONVERGED,
    CONVERGED_CLAIMS,
    CONVERGED_HORIZON,
    CORE,
    HORIZON,
    LONG,
    LONG_CLAIMS,
    LONG_HORIZON,
    OTHER_CLAIMS,
    RANDOM_HORIZON,
    RECIPE_AGAIN_CLAIMS,
    RECIPE_CLAIMS,
    REFERENCE,
    RULES,
    RULES_AGAIN,
    RULES_ARM,
    SEEDS,
    TEACHER_COST,
    Arm,
    Claim,
    cells,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LEVEL = 0.05
NOT_JUDGED = "not judged yet"
LATER = {"second": AGAIN, "third": LONG_CLAIMS, "fourth": CONVERGED_CLAIMS}
"""The rounds that test claims of the paper once more."""
BUDGETS = (0.25, 0.5, 1.0)
"""Shares of what the reference has spent at its best checkpoint."""
Courses = Mapping[tuple[str, int, str], Curve]
"""The curves of one arm, by variant, seed and figure."""


def verdict(test: PairedTest | None, planned: int) -> str:
    """Return what a claim's test allows to say of it when all planned pairs have been run (docs/evidence/plan.md)."""
    if test is None or test.seeds < planned:
        return NOT_JUDGED
    if test.p_holm >= LEVEL:
        return "not shown"
    return "shown" if test.difference.mean > 0 else "the opposite is shown"


def claim_differences(runs: Sequence[Run], claims: Sequence[Claim] = CLAIMS) -> dict[str, list[float]]:
    """Return each claim's differences in accuracy on the test problems, one for each planned pair that has been run."""
    scores = {(run.comparison, run.variant, run.seed): run.figures[SCORE] for run in runs if not run.failed}
    return {
        claim.number: [
            scores[arm, claim.better, seed] - scores[arm, claim.worse, seed]
            for arm, seed in claim.pairs()
            if {(arm, claim.better, seed), (arm, claim.worse, seed)} <= scores.keys()
        ]
        for claim in claims
    }


def claim_tests(runs: Sequence[Run], claims: Sequence[Claim] = CLAIMS) -> dict[str, PairedTest]:
    """Test the claims that have two pairs or more; Holm's correction is over all of the round's."""
    return paired_tests(claim_differences(runs, claims), family=len(claims))


def early_differences(curves: Sequence[Curve], claims: Sequence[Claim], most: int) -> dict[str, list[float]]:
    """Return each claim's differences in accuracy on the validation problems, had the runs ended after `most` steps.

    Each run's accuracy is that of the validation with the lowest loss up to there.
    """
    found = {(curve.comparison, curve.variant, curve.seed, curve.figure): curve for curve in curves}

    def accuracy(arm: str, variant: str, seed: int) -> float:
        loss = found[arm, variant, seed, "validation_loss"]
        known = [index for index, step in enumerate(loss.steps) if step <= most]
        return found[arm, variant, seed, "accuracy"].values[min(known, key=loss.values.__getitem__)]

    return {
        claim.number: [
            accuracy(arm, claim.better, seed) - accuracy(arm, claim.worse, seed)
            for arm, seed in claim.pairs()
            if {(arm, claim.better, seed, "accuracy"), (arm, claim.worse, seed, "accuracy")} <= found.keys()
        ]
        for claim in claims
    }


def rule_differences(
    curves: Sequence[Curve], rules: Sequence[str] = RULES, seeds: Sequence[int] = SEEDS
) -> dict[str, list[float]]:
    """Return each rule's accuracy on validation problems minus the reference's, at equal compute, one a seed.

    The compute is that of the reference at its best checkpoint, in positions; between validations accuracy is taken to
    change in a straight line. A run that had ended before by patience has the accuracy of its last validation.
    """
    found = {(curve.variant, curve.seed, curve.figure): curve for curve in curves if curve.comparison == RULES_ARM.name}

    def accuracy(variant: str, seed: int, compute: float) -> float:
        return float(np.interp(compute, positions(found, variant, seed), found[variant, seed, "accuracy"].values))

    def difference(rule: str, seed: int) -> float:
        best = int(np.argmin(found[REFERENCE, seed, "validation_loss"].values))
        compute = positions(found, REFERENCE, seed)[best]
        return accuracy(rule, seed, compute) - accuracy(REFERENCE, seed, compute)

    return {
        rule: [
            difference(rule, seed)
            for seed in seeds
            if {(rule, seed, "accuracy"), (REFERENCE, seed, "accuracy")} <= found.keys()
        ]
        for rule in rules
    }


def positions(curves: Courses, variant: str, seed: int) -> list[float]:
    """Return the positions that a run had processed at each validation, the teacher's by its cost."""
    student, teacher = (curves[variant, seed, name].values for name in ("student_tokens", "teacher_tokens"))
    return [ours + TEACHER_COST * theirs for ours, theirs in zip(student, teacher, strict=True)]


def budget_differences(
    curves: Sequence[Curve], arm: str, rival: str, costs: Callable[[Courses, str, int], Sequence[float]]
) -> list[list[float]]:
    """Return the reference's accuracy on validation problems minus a rival's at the budgets of `BUDGETS`, one a seed.

    A budget is a share of what the reference has spent at its best checkpoint, as a mean over its seeds. A run has the
    accuracy of the validation with the lowest loss within the budget, or its first; one that had ended keeps its best.
    """
    found = {(curve.variant, curve.seed, curve.figure): curve for curve in curves if curve.comparison == arm}
    seeds = {variant: {seed for name, seed, _ in found if name == variant} for variant in (REFERENCE, rival)}

    def best(variant: str, seed: int, most: float) -> int:
        spent, loss = costs(found, variant, seed), found[variant, seed, "validation_loss"].values
        return min((index for index, cost in enumerate(spent) if cost <= most or not index), key=loss.__getitem__)

    def accuracy(variant: str, seed: int, most: float) -> float:
        return found[variant, seed, "accuracy"].values[best(variant, seed, most)]

    spent = [costs(found, REFERENCE, seed)[best(REFERENCE, seed, math.inf)] for seed in seeds[REFERENCE]]
    return [
        [
            accuracy(REFERENCE, seed, share * fmean(spent)) - accuracy(rival, seed, share * fmean(spent))
            for seed in sorted(seeds[REFERENCE] & seeds[rival])
        ]
        for share in BUDGETS
    ]


def seconds(curves: Courses, variant: str, seed: int) -> Sequence[float]:
    """Return the CPU seconds that a run had taken at each validation, without the validations'."""
    return curves[variant, seed, "cpu_seconds"].values


def budgets_table(curves: Sequence[Curve], costs: Callable[[Courses, str, int], Sequence[float]]) -> str:
    """Return the table of what the reference is ahead by at each budget; nothing is tested."""
    rows = []
    for arm in (*ARMS, CONVERGED, LONG):
        known = {curve.variant for curve in curves if curve.comparison == arm.name}
        for rival in CORE:
            if rival != REFERENCE and {rival, REFERENCE} <= known:
                found = budget_differences(curves, arm.name, rival, costs)
                rows.append([f"`{arm.name}`", f"`{rival}`", str(len(found[0])), *map(_mean_text, found)])
    header = ["arm", f"`{REFERENCE}` minus", "seeds", *(f"{share:g} of the budget" for share in BUDGETS)]
    return "\n".join(markdown_table(header, rows, numbers=False)) + "\n"


def rules_table(
    runs: Sequence[Run], curves: Sequence[Curve], rules: Sequence[str] = RULES, seeds: tuple[int, ...] = SEEDS
) -> str:
    """Return the table of the rules that may beat the reference; Holm's correction is over all of the round's.

    Beside it, without a test: the difference on the test problems, each run at its own best checkpoint.
    """
    found = rule_differences(curves, rules, seeds)
    tests = paired_tests(found, family=len(rules))
    at_end = claim_differences(runs, [Claim(rule, rule, RULES_ARM, rule, REFERENCE, seeds) for rule in rules])
    rows = [
        [f"`{rule}`", *_difference_cells(found[rule], tests.get(rule), len(seeds)), _mean_text(at_end[rule])]
        for rule in rules
    ]
    header = ["rule", "seeds", "at equal compute, validation", "p", "p (Holm)", "better than K = 25"]
    return "\n".join(markdown_table([*header, "at the end, test"], rows, numbers=False)) + "\n"


def study_tables(runs: Sequence[Run], curves: Sequence[Curve] = ()) -> dict[str, str]:
    """Return the tables of the study by their names."""
    return {
        "claims": _claims_table(runs, CLAIMS, later=LATER),
        "claims-again": _claims_table(runs, AGAIN),
        "claims-long": _claims_table(runs, LONG_CLAIMS),
        "claims-converged": _claims_table(runs, CONVERGED_CLAIMS),
        "early-long": _early_table(curves, LONG_CLAIMS, (RANDOM_HORIZON, LONG_HORIZON)),
        "early-converged": _early_table(curves, CONVERGED_CLAIMS, (HORIZON, CONVERGED_HORIZON)),
        "others": _claims_table(runs, OTHER_CLAIMS, "in the place of the default", "better"),
        "rules": rules_table(runs, curves),
        "rules-again": rules_table(runs, curves, RULES_AGAIN, AGAIN_SEEDS),
        "recipe": _claims_table(runs, RECIPE_CLAIMS, "in the place of the default", "better"),
        "recipe-again": _claims_table(runs, RECIPE_AGAIN_CLAIMS, "in the place of the default", "better"),
        "budgets-seconds": budgets_table(curves, seconds),
        "budgets-positions": budgets_table(curves, positions),
        "progress": _progress_table(runs),
    }


def _progress_table(runs: Sequence[Run]) -> str:
    """Return how many runs there are of each arm, and how many of its main methods were ended by validation."""
    planned = Counter(cell.arm for cell in cells())

    def ended(arm: Arm, variant: str) -> str:
        known = [run.figures for run in runs if (run.comparison, run.variant) == (arm.name, variant)]
        steps = [figures["steps"] for figures in known if "steps" in figures]
        return f"{sum(step < arm.horizon for step in steps)} of {len(steps)}" if steps else ""

    rows = [
        [
            f"`{arm.name}`",
            f"{sum(run.comparison == arm.name for run in runs)} of {number}",
            f"{arm.horizon:,}",
            *(ended(arm, variant) for variant in CORE),
        ]
        for arm, number in planned.items()
    ]
    header = ["arm", "runs", "steps at most", *(f"`{variant}`" for variant in CORE)]
    return "\n".join(markdown_table(header, rows, numbers=False)) + "\n"


def draw_study(runs: Sequence[Run], curves: Sequence[Curve], folder: Path) -> list[Path]:
    """Draw the claims, and for each arm the accuracy of the main methods over steps, positions and seconds."""
    written: list[Path] = []
    if claim_tests(runs):
        with plot(folder / "claims.svg", written, height=0.34 * len(CLAIMS) + 1.2) as axes:
            _claims(axes, runs)
    for arm in (*ARMS, LONG, CONVERGED):
        ours = [curve for curve in curves if curve.comparison == arm.name and curve.variant in CORE]
        if ours:
            with plot(folder / f"{arm.name}-curves.svg", written, columns=3) as panels:
                _courses(panels, ours)
    return written


def _claims_table(
    runs: Sequence[Run],
    claims: Sequence[Claim],
    what: str = "claim of the paper",
    judged: str = "verdict",
    later: Mapping[str, Sequence[Claim]] | None = None,
) -> str:
    """Return a round's table; with `later` rounds, what these say of its claims is in a last column."""
    tests, found = claim_tests(runs, claims), claim_differences(runs, claims)
    after = [(name, round_, claim_tests(runs, round_)) for name, round_ in (later or {}).items()]

    def again(number: str) -> str:
        planned = [
            (name, len(claim.pairs()), done) for name, of, done in after for claim in of if claim.number == number
        ]
        return "; ".join(
            f"{name}: {done[number].difference.mean:+.1f}, {verdict(done[number], pairs)}"
            for name, pairs, done in planned
            if number in done
        )

    rows = [
        [
            claim.number,
            claim.text,
            _start(claim),
            *_difference_cells(found[claim.number], tests.get(claim.number), len(claim.pairs())),
            *([again(claim.number)] if later else []),
        ]
        for claim in claims
    ]
    header = ["", what, "start, examples", "seeds", "points of accuracy", "p", "p (Holm)", judged]
    header += ["later rounds"] if later else []
    return "\n".join(markdown_table(header, rows, numbers=False)) + "\n"


def _early_table(curves: Sequence[Curve], claims: Sequence[Claim], limits: Sequence[int]) -> str:
    found = [early_differences(curves, claims, most) for most in limits]
    rows = [
        [
            claim.number,
            claim.text,
            str(len(found[0][claim.number])),
            *(_mean_text(each[claim.number]) for each in found),
        ]
        for claim in claims
    ]
    header = ["", "claim of the paper", "seeds", *(f"within {most:,} steps" for most in limits)]
    return "\n".join(markdown_table(header, rows, numbers=False)) + "\n"


def _start(claim: Claim) -> str:
    return f"{claim.arm.init}, {claim.arm.examples:,}"


def _difference_cells(differences: Sequence[float], test: PairedTest | None, planned: int) -> list[str]:
    seeds = str(planned) if len(differences) == planned else f"{len(differences)} of {planned}"
    p_values = [p_text(test.p_value), p_text(test.p_holm)] if test else ["", ""]
    return [seeds, _mean_text(differences), *p_values, verdict(test, planned)]


def _mean_text(differences: Sequence[float]) -> str:
    """Return a mean difference with its interval, which one pair does not have."""
    if len(differences) < 2:
        return "".join(f"{value:+.1f}" for value in differences)
    mean = mean_of(differences)
    return f"{mean.mean:+.1f} [{mean.low:+.1f}, {mean.high:+.1f}]"


def _claims(axes: Axes, runs: Sequence[Run]) -> None:
    rows = {claim.number: row for row, claim in enumerate(reversed(CLAIMS))}
    rounds = ((CLAIMS, "o", 0.0), (AGAIN, "D", 0.25), (LONG_CLAIMS, "s", 0.5), (CONVERGED_CLAIMS, "^", 0.5))
    for claims, marker, below in rounds:
        for number, test in claim_tests(runs, claims).items():
            found = test.difference
            spread = [[found.mean - found.low], [found.high - found.mean]]
            color = "C0" if test.p_holm < LEVEL else "0.6"
            axes.errorbar(
                found.mean, rows[number] - below, xerr=spread, fmt=marker, color=color, capsize=3, markersize=4
            )
    axes.axvline(0, color="0.3", linewidth=1)
    labels = [
        f"{claim.number}  {claim.better} - {claim.worse} ({claim.arm.init}, {claim.arm.examples})"
        for claim in reversed(CLAIMS)
    ]
    axes.set_yticks(range(len(labels)), labels, fontsize=7)
    axes.set_xlim(-30, 55)
    axes.set_xlabel("points of accuracy, 95 % interval over seeds", fontsize=8)


def _courses(panels: Sequence[Axes], curves: Sequence[Curve]) -> None:
    by_run = {(curve.variant, curve.seed, curve.figure): curve for curve in curves}
    for variant, seed in {(curve.variant, curve.seed): None for curve in curves}:
        accuracy, seconds = (by_run[variant, seed, name] for name in ("accuracy", "cpu_seconds"))
        millions = [position / 1e6 for position in positions(by_run, variant, seed)]
        costs: list[Sequence[float]] = [accuracy.steps, millions, seconds.values]
        for axes, x in zip(panels, costs, strict=True):
            color = f"C{CORE.index(variant)}"
            first = not any(line.get_label() == variant for line in axes.lines)
            axes.plot(x, accuracy.values, color=color, linewidth=1, alpha=0.6, label=variant if first else None)
    for axes, label in zip(
        panels, ("optimiser steps", "positions, millions of the student's", "CPU seconds"), strict=True
    ):
        axes.set_xlabel(label, fontsize=8)
    panels[0].set_ylabel("accuracy on validation problems, %")
    panels[0].legend(fontsize=7, frameon=False)
