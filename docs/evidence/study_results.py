"""From the stored results of the convergence study to its claims and rules, as tables and as plots."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from analysis import PairedTest, p_text, paired_tests
from plots import plot
from records import SCORE, Curve, Run
from skd_lib._core.format import markdown_table
from study_plan import (
    AGAIN,
    AGAIN_SEEDS,
    ARMS,
    CLAIMS,
    CORE,
    LONG,
    LONG_CLAIMS,
    OTHER_CLAIMS,
    RECIPE_CLAIMS,
    REFERENCE,
    RULES,
    RULES_AGAIN,
    RULES_ARM,
    TEACHER_COST,
    Claim,
    cells,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LEVEL = 0.05


def verdict(test: PairedTest | None) -> str:
    """Return what a claim's test allows to say of it, by the rule of docs/evidence/plan.md."""
    if test is None:
        return "not tested yet"
    if test.p_holm >= LEVEL:
        return "not shown"
    return "shown" if test.difference.mean > 0 else "the opposite is shown"


def claim_differences(runs: Sequence[Run], claims: Sequence[Claim] = CLAIMS) -> dict[str, list[float]]:
    """Return each claim's differences in accuracy, one a seed of its round and a teacher."""
    scores = {(run.comparison, run.variant, run.seed): run.figures[SCORE] for run in runs}
    seeds = sorted({run.seed for run in runs if (run.seed in AGAIN_SEEDS) == (claims is AGAIN)})

    def differences(claim: Claim) -> list[float]:
        pairs = [
            [scores.get((arm.name, name, seed)) for name in (claim.better, claim.worse)]
            for arm in (claim.arm, *claim.more_arms)
            for seed in seeds
        ]
        return [better - worse for better, worse in pairs if better is not None and worse is not None]

    return {claim.number: differences(claim) for claim in claims}


def claim_tests(runs: Sequence[Run], claims: Sequence[Claim] = CLAIMS) -> dict[str, PairedTest]:
    """Test the claims that have two seeds or more, paired by seed; Holm's correction is over all of the round's."""
    return paired_tests(claim_differences(runs, claims), family=len(claims))


def rule_differences(curves: Sequence[Curve], rules: Sequence[str] = RULES) -> dict[str, list[float]]:
    """Return each rule's accuracy on validation problems minus the reference's, at equal compute, one a seed.

    The compute is that of the reference at its best checkpoint, in positions; between validations accuracy is taken to
    change in a straight line. A run that had ended before by patience has the accuracy of its last validation.
    """
    found = {(curve.variant, curve.seed, curve.figure): curve for curve in curves if curve.comparison == RULES_ARM.name}
    known = {seed for variant, seed, _ in found if variant == REFERENCE}
    seeds = sorted(seed for seed in known if (seed in AGAIN_SEEDS) == (rules is RULES_AGAIN))

    def accuracy(variant: str, seed: int, compute: float) -> float:
        return float(np.interp(compute, positions(found, variant, seed), found[variant, seed, "accuracy"].values))

    def difference(rule: str, seed: int) -> float:
        best = int(np.argmin(found[REFERENCE, seed, "validation_loss"].values))
        compute = positions(found, REFERENCE, seed)[best]
        return accuracy(rule, seed, compute) - accuracy(REFERENCE, seed, compute)

    return {rule: [difference(rule, seed) for seed in seeds if (rule, seed, "accuracy") in found] for rule in rules}


def positions(curves: Mapping[tuple[str, int, str], Curve], variant: str, seed: int) -> list[float]:
    """Return the positions that a run had processed at each validation, the teacher's by its cost."""
    student, teacher = (curves[variant, seed, name].values for name in ("student_tokens", "teacher_tokens"))
    return [ours + TEACHER_COST * theirs for ours, theirs in zip(student, teacher, strict=True)]


def rules_table(curves: Sequence[Curve], rules: Sequence[str] = RULES) -> str:
    """Return the table of the rules that may beat the reference; Holm's correction is over all of the round's."""
    found = rule_differences(curves, rules)
    tests = paired_tests(found, family=len(rules))
    rows = [[f"`{rule}`", *_difference_cells(found[rule], tests.get(rule))] for rule in rules]
    header = ["rule", "seeds", "points of accuracy", "p", "p (Holm)", "better than K = 25"]
    return "\n".join(markdown_table(header, rows, numbers=False)) + "\n"


def study_tables(runs: Sequence[Run], curves: Sequence[Curve] = ()) -> dict[str, str]:
    """Return the tables of the study by their names: `claims`, `claims-again`, `claims-long`, `others`, `rules`,
    `rules-again`, `recipe` and `progress`."""
    done, planned = Counter(run.comparison for run in runs), Counter(cell.arm.name for cell in cells())
    progress = [[f"`{name}`", str(done[name]), str(number)] for name, number in planned.items()]
    return {
        "claims": _claims_table(runs, CLAIMS),
        "claims-again": _claims_table(runs, AGAIN),
        "claims-long": _claims_table(runs, LONG_CLAIMS),
        "others": _claims_table(runs, OTHER_CLAIMS, "in the place of the default", "better"),
        "rules": rules_table(curves),
        "rules-again": rules_table(curves, RULES_AGAIN),
        "recipe": _claims_table(runs, RECIPE_CLAIMS, "in the place of the default", "better"),
        "progress": "\n".join(markdown_table(["arm", "runs", "planned"], progress, numbers=False)) + "\n",
    }


def draw_study(runs: Sequence[Run], curves: Sequence[Curve], folder: Path) -> list[Path]:
    """Draw the claims, and for each arm the accuracy of the main methods over steps, positions and seconds."""
    written: list[Path] = []
    if claim_tests(runs):
        with plot(folder / "claims.svg", written, height=0.3 * len(CLAIMS) + 1.2) as axes:
            _claims(axes, runs)
    for arm in (*ARMS, LONG):
        ours = [curve for curve in curves if curve.comparison == arm.name and curve.variant in CORE]
        if ours:
            with plot(folder / f"{arm.name}-curves.svg", written, columns=3) as panels:
                _courses(panels, ours)
    return written


def _claims_table(
    runs: Sequence[Run], claims: Sequence[Claim], what: str = "claim of the paper", judged: str = "verdict"
) -> str:
    tests, found = claim_tests(runs, claims), claim_differences(runs, claims)
    rows = [_claim_row(claim, found[claim.number], tests.get(claim.number)) for claim in claims]
    header = ["", what, "start, examples", "seeds", "points of accuracy", "p", "p (Holm)", judged]
    return "\n".join(markdown_table(header, rows, numbers=False)) + "\n"


def _claim_row(claim: Claim, differences: Sequence[float], test: PairedTest | None) -> list[str]:
    start = f"{claim.arm.init}, {claim.arm.examples:,}"
    return [claim.number, claim.text, start, *_difference_cells(differences, test)]


def _difference_cells(differences: Sequence[float], test: PairedTest | None) -> list[str]:
    effect, p_values = "".join(f"{value:+.1f}" for value in differences), ["", ""]
    if test is not None:
        mean = test.difference
        effect = f"{mean.mean:+.1f} [{mean.low:+.1f}, {mean.high:+.1f}]"
        p_values = [p_text(test.p_value), p_text(test.p_holm)]
    return [str(len(differences)), effect, *p_values, verdict(test)]


def _claims(axes: Axes, runs: Sequence[Run]) -> None:
    rows = {claim.number: row for row, claim in enumerate(reversed(CLAIMS))}
    for claims, marker, below in ((CLAIMS, "o", 0.0), (AGAIN, "D", 0.3)):
        for number, test in claim_tests(runs, claims).items():
            found = test.difference
            spread = [[found.mean - found.low], [found.high - found.mean]]
            color = "C0" if test.p_holm < LEVEL else "0.6"
            axes.errorbar(
                found.mean, rows[number] - below, xerr=spread, fmt=marker, color=color, capsize=3, markersize=4
            )
    axes.axvline(0, color="0.3", linewidth=1)
    labels = [f"{claim.better} - {claim.worse} ({claim.arm.init}, {claim.arm.examples})" for claim in reversed(CLAIMS)]
    axes.set_yticks(range(len(labels)), labels, fontsize=7)
    axes.set_xlim(-30, 50)
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
