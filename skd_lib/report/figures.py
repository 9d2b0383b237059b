"""The page's charts of a run: how the training went, and how the student does as draft model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from markupsafe import Markup

from skd_lib.report.charts import Format, Series, bar_chart, line_chart
from skd_lib.report.curves import groups, smoothed, thinned
from skd_lib.report.summary import Course, Moment, Specdec

_SMOOTHED_FROM = 20
"""Points from which on a noisy curve is drawn with its moving mean."""
_DOTS = 40
"""Points up to which each is marked."""
_MOMENT_KINDS: dict[Moment, str] = {"before": "neutral", "after": "student"}


@dataclass(frozen=True)
class Figure:
    """A chart with its words; `legend` holds CSS classes and names of its marks."""

    title: str
    note: str
    chart: Markup
    legend: Sequence[tuple[str, str]] = ()


def learning_curves(course: Course) -> list[Figure]:
    """Losses, and what the sampler did, over the training."""
    sampler, training = course.steps, course.training_steps
    curves: tuple[tuple[str, str, Sequence[int], Sequence[float], Format], ...] = (
        ("Rejection rate", "Share of tested drafts the teacher replaced", sampler, course.rejection_rate, percent),
        ("Tokens per teacher call", "While sampling to train on", sampler, course.tokens_per_teacher_call, plain),
        ("Response length", "Mean tokens of a response trained on", training, course.response_length, plain),
    )
    found = [_loss(course)] if course.training_loss or course.validation_loss else []
    for title, meaning, steps, values, number in curves:
        if values:
            parts = groups(values, 8)
            note = f"{meaning}: {number(fmean(parts[0]))} → {number(fmean(parts[-1]))}."
            lines = _noisy("teacher", steps, values)
            chart = line_chart(lines, label=f"{title}. {note}", number=number, from_zero=True)
            found.append(Figure(title, note, chart))
    return found


def _loss(course: Course) -> Figure:
    lines, legend, note = [], [], ""
    if course.training_loss:
        lines += _noisy("neutral", course.training_steps, course.training_loss)
        legend.append(("neutral", "training"))
    if course.validation_loss:
        losses = course.validation_loss
        best = min(range(len(losses)), key=losses.__getitem__)
        note = f"Validation {losses[0]:.3f} → {losses[-1]:.3f}, lowest {losses[best]:.3f}" + (
            f" at step {course.validation_steps[best]:,}, whose weights were kept." if best else " before training."
        )
        lines.append(Series("student", *thinned(course.validation_steps, losses), dots=len(losses) <= _DOTS))
        legend.append(("student", "validation"))
    return Figure("Loss", note, line_chart(lines, label=f"Loss by step. {note}", number=plain), legend)


def draft_figures(specdec: dict[Moment, Specdec]) -> list[Figure]:
    """Acceptance by position, and speed by draft length."""
    legend = [(_MOMENT_KINDS[moment], f"{moment} distillation") for moment in specdec]
    figures = []
    longest = max((len(draft.acceptance_by_position) for draft in specdec.values()), default=0)
    if longest:
        places = [
            (
                str(place + 1),
                [
                    (_MOMENT_KINDS[moment], draft.acceptance_by_position[place])
                    for moment, draft in specdec.items()
                    if place < len(draft.acceptance_by_position)
                ],
            )
            for place in range(longest)
        ]
        note = "Share of drafts accepted at each position of a block, among those that were tested."
        chart = bar_chart(places, label=note, number=percent)
        figures.append(Figure("Acceptance by position", note, chart, legend))
    lines = []
    for moment, draft in specdec.items():
        points = sorted(
            (int(entry["gamma"]), entry["speedup"]) for entry in draft.sweep if {"gamma", "speedup"} <= set(entry)
        )
        if points:
            lines.append(
                Series(_MOMENT_KINDS[moment], [gamma for gamma, _ in points], [y for _, y in points], dots=True)
            )
    if lines:
        note = "Speed-up over the teacher alone by the number of tokens drafted for each teacher call."
        figures.append(
            Figure("Draft length", note, line_chart(lines, label=note, number=plain, from_zero=True), legend)
        )
    return figures


def _noisy(kind_: str, steps: Sequence[int], values: Sequence[float]) -> list[Series]:
    """A curve that jumps from step to step: its points behind, its moving mean in front."""
    steps, values = thinned(steps, values)
    if len(values) < _SMOOTHED_FROM:
        return [Series(kind_, steps, values, dots=True)]
    return [Series(f"{kind_} faint", steps, values), Series(kind_, steps, smoothed(values, max(3, len(values) // 10)))]


def plain(value: float) -> str:
    """A number with three digits that say something."""
    return f"{value:,.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def percent(value: float) -> str:
    """A share of 1, likewise."""
    return f"{100 * value:.3g}%"
