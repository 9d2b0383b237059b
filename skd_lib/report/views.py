"""The headlines and table rows of the page, ready for its template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import NamedTuple

from markupsafe import Markup

from skd_lib._core.format import count, decoding, duration, plain
from skd_lib.report.charts import bars, interval, share
from skd_lib.report.names import ROLE_NAMES, metric_name
from skd_lib.report.render import UNSURE, WITHHELD
from skd_lib.report.render import caution_lines as report_cautions
from skd_lib.report.summary import Summary
from skd_lib.report.worth import changed_gap
from skd_lib.results import (
    Course,
    Moment,
    PairedTest,
    Percentiles,
    Role,
    Score,
    Scores,
    ServedMeasurement,
    ServedPasses,
    Specdec,
)

MAIN_PAIRS: tuple[tuple[Role, Role], ...] = (
    ("student_after", "student_before"),
    ("student_after", "teacher"),
    ("teacher", "teacher_base"),
)
"""Did it help, how far is the student from the teacher, and had the teacher learned the task."""
FURTHER_FIGURES = (
    *("batch_size", "prompts", "repeats", "tokens"),
    *("teacher_only_tokens_per_second", "speculative_tokens_per_second"),
    *("theoretical_speedup_iid", "best_gamma", "best_speedup"),
)
"""Of the benchmark, which nothing else on the page shows."""
TIMES, TO, MINUS = "\N{MULTIPLICATION SIGN}", "\N{EN DASH}", "\N{MINUS SIGN}"


class Headline(NamedTuple):
    """One figure for a quick look, and figures to compare it with."""

    label: str
    value: str
    details: list[str]


class Cell(NamedTuple):
    """A score, its 95 % interval as text and as a picture."""

    score: str
    interval: str
    picture: Markup


class QualityTable(NamedTuple):
    """Models by metrics on one test set."""

    metrics: list[str]
    rows: list[tuple[Role, str, list[Cell], int | None]]


class Share(NamedTuple):
    """A part of some total, as a bar."""

    name: str
    value: str
    bar: Markup


def kind(role: Role) -> str:
    """Return the CSS class of a model: its colour."""
    return "teacher" if role.startswith("teacher") else "student"


def model_name(reference: str) -> str:
    """Shorten a model's reference: a file in a wheel without the digest, a folder or file without its parents."""
    model, comma, rest = reference.partition(", ")
    if "://" in model or model.startswith("/"):
        model = PurePosixPath(model.partition("?")[0].rstrip("/")).name
    return model + comma + rest


def headlines(summary: Summary) -> list[Headline]:
    """Return the figures at the top: what the student is worth, then how it does as a draft."""
    found, worth = [], summary.worth()
    metric = summary.task_metric
    scores = {role: values[metric] for role, values in summary.models.items() if metric in values}
    if "student_after" in scores:
        bounds = summary.intervals.get("student_after", {}).get(metric)
        mark = UNSURE if metric in summary.cautions.get("student_after", {}) else ""
        interval = [f"95%: {bounds[0]:.1f} to {bounds[1]:.1f}{mark}"] if bounds else []
        before = [f"before: {scores['student_before']:.1f}"] if "student_before" in scores else []
        label = f"{metric_name(metric)} of the student"
        found.append(Headline(label, f"{scores['student_after']:.1f}", [*interval, *before]))
    if worth.quality_kept is not None:
        label = f"of the teacher's {metric_name(metric)} kept"
        gap = [] if worth.gap_closed is None else [changed_gap(worth.gap_closed)]
        found.append(Headline(label, f"{worth.quality_kept:.0%}", [f"teacher: {scores['teacher']:.1f}", *gap]))
    if worth.relative_speed is not None:
        speeds = worth.student_tokens_per_second, worth.teacher_tokens_per_second
        detail = " against ".join(plain(speed) for speed in speeds if speed is not None)
        found.append(Headline("as fast as the teacher", f"{worth.relative_speed:.2f}{TIMES}", [f"{detail} tokens/s"]))
    if worth.relative_size is not None:
        sizes = " of ".join(count(size) for size in (worth.student_parameters, worth.teacher_parameters) if size)
        found.append(Headline("of the teacher's parameters", f"{worth.relative_size:.0%}", [sizes]))
    return [*found, *_draft_headlines(summary.specdec)]


def _draft_headlines(specdec: Mapping[Moment, Specdec]) -> list[Headline]:
    """Return acceptance and tokens a call; a speed-up where there is one."""
    first, last = specdec.get("before"), specdec.get("after")
    if last is None:
        return []
    shown = [
        ("of its drafts accepted by the teacher", "{:.0%}", "acceptance_rate"),
        ("tokens per teacher call", "{:.2f}", "tokens_per_teacher_call"),
    ]
    if last.speedup > 1 and not last.is_unsure:
        shown.append(("speed-up of the teacher with it as draft", f"{{:.2f}}{TIMES}", "speedup"))
    earlier = first.figures() if first else {}
    return [
        Headline(
            label,
            text.format(last.figures()[name]),
            [f"before: {text.format(earlier[name])}"] if name in earlier else [],
        )
        for label, text, name in shown
    ]


def quality(summary: Summary) -> QualityTable:
    """Return the table of the main test set."""
    scores = {
        role: Scores(
            metrics={
                name: Score(score=score, low=bounds[0], high=bounds[1], caution=cautions.get(name, ""))
                for name, score in values.items()
                for bounds in [summary.intervals.get(role, {}).get(name, (score, score))]
            },
            examples=summary.examples.get(role, 0),
        )
        for role, values in summary.models.items()
        for cautions in [summary.cautions.get(role, {})]
    }
    return quality_table(scores, summary.task_metric)


def quality_table(scores: dict[Role, Scores], first: str) -> QualityTable:
    """Return models by metrics, the metric `first` first, each metric's intervals on one scale."""
    names = sorted({name: None for found in scores.values() for name in found.metrics}, key=lambda name: name != first)
    scales = {
        name: (
            min(found.metrics[name].low for found in scores.values() if name in found.metrics),
            max(found.metrics[name].high for found in scores.values() if name in found.metrics),
        )
        for name in names
    }
    rows = []
    for role, found in scores.items():
        cells = []
        for name in names:
            score = found.metrics.get(name)
            if score is None:
                cells.append(Cell("", "", Markup("")))
                continue
            bounds = f"{score.low:.1f} {TO} {score.high:.1f}" if score.high > score.low else ""
            bounds += UNSURE if score.caution else ""
            picture = interval(score.score, score.low, score.high, scales[name], kind(role))
            cells.append(Cell(f"{score.score:.1f}", bounds, picture))
        rows.append((role, ROLE_NAMES[role], cells, found.examples or None))
    return QualityTable([metric_name(name) for name in names], rows)


def missing(scores: Mapping[Role, Scores]) -> dict[str, str]:
    """Return the metrics that are missing for some model, and why."""
    return {name: reason for found in scores.values() for name, reason in found.missing.items()}


ComparisonRow = tuple[str, str, str, str, str, int]
"""Models, metric, difference, interval, p-value, examples."""


def comparison_rows(comparisons: Sequence[PairedTest]) -> tuple[list[ComparisonRow], list[ComparisonRow]]:
    """Return the pairs that a distillation is about, and the others."""
    main = [comparison for comparison in comparisons if (comparison.a, comparison.b) in MAIN_PAIRS]
    others = [comparison for comparison in comparisons if (comparison.a, comparison.b) not in MAIN_PAIRS]
    return [_comparison_row(comparison) for comparison in main], [_comparison_row(comparison) for comparison in others]


def _comparison_row(comparison: PairedTest) -> ComparisonRow:
    return (
        f"{ROLE_NAMES[comparison.a]} against {ROLE_NAMES[comparison.b]}",
        metric_name(comparison.metric),
        _signed(comparison.difference),
        "" if comparison.p_value is None else f"{_signed(comparison.low)} to {_signed(comparison.high)}",
        _p_value(comparison.p_value),
        comparison.n,
    )


def _p_value(value: float | None) -> str:
    if value is None:
        return WITHHELD
    return "< 0.002" if value < 0.002 else f"{value:.3f}"


def caution_lines(summary: Summary) -> list[str]:
    """Explain why intervals are marked and tests withheld, held-out sets included."""
    further = dict.fromkeys(
        f"{UNSURE} {score.caution}."
        for found in summary.held_out.values()
        for scores in found.values()
        for score in scores.metrics.values()
        if score.caution
    )
    return list(dict.fromkeys([*report_cautions(summary), *further]))


def further_figures(specdec: Mapping[Moment, Specdec]) -> list[tuple[str, list[str]]]:
    """Return the benchmark's further figures: name, and a number for each moment."""
    found = [(name, [getattr(draft, name) for draft in specdec.values()]) for name in FURTHER_FIGURES]
    return [
        (name.replace("_", " "), ["" if value is None else plain(float(value)) for value in values])
        for name, values in found
        if any(value is not None for value in values)
    ]


def latencies(specdec: Mapping[Moment, Specdec]) -> list[tuple[str, list[str]]]:
    """Return each decoder with percentiles of the wait for the first token and for each after it, in milliseconds."""
    waits = {f"with the student {moment}": draft.latency for moment, draft in specdec.items()}
    alone = [draft.teacher_only_latency for draft in specdec.values() if draft.teacher_only_latency]
    return [
        (name, [*_milliseconds(wait.first_token), *_milliseconds(wait.per_token)])
        for name, wait in {"teacher alone": alone[-1] if alone else None, **waits}.items()
        if wait is not None
    ]


def served(specdec: Mapping[Moment, Specdec]) -> list[tuple[Moment, str, list[str], bool]]:
    """Return what vLLM measured, by draft and setting, and whether the speed-up may be chance.

    The cells are requests in flight, speeds without and with the draft, speed-up, tokens a call.
    """
    return [
        (moment, decoding(each.temperature), _served_cells(found, each), found.is_unsure(each))
        for moment, draft in specdec.items()
        if (found := draft.served)
        for model in found.drafts.values()
        for each in model.passes
    ]


def _served_cells(found: ServedMeasurement, each: ServedPasses) -> list[str]:
    alone = found.alone.at(each.temperature, each.concurrency).tokens_per_second
    return [
        str(each.concurrency),
        plain(alone),
        plain(each.tokens_per_second),
        f"{found.speedup(each):.2f}{TIMES}{'?' if found.is_unsure(each) else ''}",
        f"{each.counts.accepted_length:.2f}" if each.counts else "",
    ]


def lengths(summary: Summary) -> list[tuple[Role, str, str, str, str, Markup]]:
    """Return model, mean, longest and truncated, and the histogram's shape."""
    return [
        (
            role,
            ROLE_NAMES[role],
            f"{found.mean:.1f}",
            str(found.longest),
            f"{found.truncated_fraction:.1%}",
            bars(found.counts, kind(role)),
        )
        for role, found in summary.lengths.items()
    ]


def step_times(seconds: dict[str, float]) -> list[Share]:
    """Return the pipeline steps, and the part of the total that each took."""
    steps = {name: value for name, value in seconds.items() if name != "total"}
    longest = max(steps.values(), default=0) or 1
    rows = [Share(name, duration(value), share(value / longest, "neutral")) for name, value in steps.items()]
    return [*rows, Share("total", duration(seconds.get("total", sum(steps.values()))), Markup(""))] if rows else []


def phase_times(course: Course) -> list[tuple[Share, str]]:
    """Return the phases of the distillation: seconds, share, and the most memory where it was measured."""
    total = sum(course.seconds.values()) or 1
    return [
        (
            Share(name, f"{duration(value)} · {value / total:.0%}", share(value / total, "student")),
            gigabytes(course.peak_bytes[name]) if name in course.peak_bytes else "",
        )
        for name, value in course.seconds.items()
    ]


def gigabytes(size: int) -> str:
    """Return bytes as people read them."""
    return f"{size / 1e9:.2f} GB"


def _milliseconds(wait: Percentiles | None) -> list[str]:
    return ["", "", ""] if wait is None else [plain(1000 * seconds) for seconds in (wait.p50, wait.p90, wait.p99)]


def _signed(value: float) -> str:
    return f"{value:+.1f}".replace("-", MINUS)
