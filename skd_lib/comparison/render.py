"""A comparison as tables in the terminal, as Markdown, and as a CSV of every run."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.text import Text

from skd_lib._core.format import TextTable, duration
from skd_lib.comparison.table import Comparison, VariantResult, VariantScore, VariantTest
from skd_lib.report.names import metric_name
from skd_lib.report.render import UNSURE, WITHHELD, draft_cells
from skd_lib.results import Score

SIGNIFICANT = 0.05
_COSTS = {
    "rejection_rate": "rejected",
    "tokens_per_teacher_call": "tokens a call",
    "steps": "steps",
    "response_tokens": "response tokens",
    "student_tokens": "student tokens",
    "teacher_tokens": "teacher tokens",
    "seconds": "time",
}


def render(comparison: Comparison) -> RenderableType:
    """Return the tables, to be printed by a `rich` console."""
    parts: list[RenderableType] = [table.to_rich() for table in tables(comparison)]
    parts += [Padding(Text(line, style="dim"), (0, 2)) for line in notes(comparison)]
    return Group(*parts)


def to_markdown(comparison: Comparison) -> str:
    """Return the tables as Markdown."""
    lines = [f"# {comparison.name}", ""]
    lines += [line for table in tables(comparison) for line in table.to_markdown()]
    lines += [f"- {line}" for line in notes(comparison)]
    return "\n".join(lines) + "\n"


def to_csv(comparison: Comparison) -> str:
    """Return one row a run, failed ones too; a figure that a run does not have is empty."""
    rows = [trial.flat() for trial in comparison.trials]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def tables(comparison: Comparison) -> Iterator[TextTable]:
    """Yield a table a metric, the task's first; then drafts, costs, and the runs that failed."""
    found = list(dict.fromkeys(metric for each in comparison.variants for metric in each.scores))
    for metric in sorted(found, key=lambda name: (name not in comparison.metrics, found.index(name))):
        yield _metric_table(comparison, metric)
    if any(each.draft for each in comparison.variants):
        yield TextTable(
            "As draft of the teacher (means over the runs)",
            ["variant", "accepted", "tokens a teacher call", "speed-up"],
            [[each.variant, *draft_cells(each.draft)] for each in comparison.variants if each.draft],
            numbers=False,
        )
    costs = [name for name in _COSTS if any(name in each.costs for each in comparison.variants)]
    yield TextTable(
        "What a run cost (means over the runs)",
        ["variant", *(_COSTS[name] for name in costs)],
        [[each.variant, *(_cost(each, name) for name in costs)] for each in comparison.variants if each.runs],
        numbers=False,
    )
    failed = [[trial.variant, str(trial.seed), trial.reason] for trial in comparison.trials if trial.reason]
    if failed:
        yield TextTable("Runs that failed", ["variant", "seed", "reason"], failed, numbers=False)


def notes(comparison: Comparison) -> Iterator[str]:
    """Explain how to read the tables."""
    kinds = {score.kind for each in comparison.variants for score in each.scores.values()}
    if "t over seeds" in kinds:
        yield "Intervals of several runs: 95 %, Student's t over the seeds; they are about training once more."
    if "bootstrap over examples" in kinds:
        yield (
            "Intervals of one run, and of runs with one and the same score: 95 %, over the test examples (Wilson's for "
            "accuracy, else bootstrap); they are about other examples."
        )
    cautions = (score.caution for each in comparison.variants for score in each.scores.values())
    teachers = (score.caution for score in comparison.teacher.values())
    for caution in dict.fromkeys(filter(None, [*teachers, *cautions])):
        yield f"{UNSURE} {caution}."
    if any(test.p_value is None for each in comparison.variants for test in each.tests.values()):
        yield f"p is {WITHHELD}: there chance alone makes small p-values far too often."
    if any(each.tests for each in comparison.variants):
        yield (
            f"Difference, its 95 % interval and p: against {comparison.reference}, paired bootstrap over the test "
            "examples, each with the answers of all seeds that both have. p (Holm) is adjusted for the number of "
            f"variants; * marks those below {SIGNIFICANT:g}."
        )
    yield (
        "Rejected, and tokens a teacher call: while sampling to train. Student and teacher tokens: positions that went "
        "through a forward pass while training, prompts included. Time: of the training, sampling, "
        "loss and optimiser, without validation."
    )


def _metric_table(comparison: Comparison, metric: str) -> TextTable:
    rows = [
        [each.variant, _runs(each), _estimate(each.scores.get(metric)), *_test(each.tests.get(metric))]
        for each in comparison.variants
    ]
    if metric in comparison.teacher:
        score = comparison.teacher[metric]
        rows.insert(0, ["(teacher)", "", _interval(score.score, score), "", "", ""])
    header = ["variant", "runs", "mean [95 %]", f"minus {comparison.reference} [95 %]", "p", "p (Holm)"]
    return TextTable(metric_name(metric), header, rows, numbers=False)


def _runs(variant: VariantResult) -> str:
    return f"{variant.runs} of {variant.runs + variant.failed}" if variant.failed else str(variant.runs)


def _estimate(score: VariantScore | None) -> str:
    return "" if score is None else _interval(score.mean, score)


def _interval(value: float, score: VariantScore | Score) -> str:
    return f"{value:.1f} [{score.low:.1f}, {score.high:.1f}]{UNSURE if score.caution else ''}"


def _test(test: VariantTest | None) -> list[str]:
    if test is None:
        return [""] * 3
    if test.p_value is None or test.p_holm is None:
        return [f"{test.difference:+.1f}", "withheld", ""]
    star = " *" if test.p_holm < SIGNIFICANT else ""
    difference = f"{test.difference:+.1f} [{test.low:+.1f}, {test.high:+.1f}]"
    return [difference, f"{test.p_value:.3f}", f"{test.p_holm:.3f}{star}"]


def _cost(variant: VariantResult, name: str) -> str:
    if name not in variant.costs:
        return ""
    value = variant.costs[name]
    if name == "seconds":
        return duration(value)
    if name == "rejection_rate":
        return f"{value:.2%}"
    if name == "tokens_per_teacher_call":
        return f"{value:.2f}"
    return f"{value / 1000:,.1f}k" if name.endswith("_tokens") and value >= 1000 else f"{value:,.0f}"
