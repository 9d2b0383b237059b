"""The page's charts of a run: how the training went, and how the student does as draft model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import NamedTuple

from markupsafe import Markup

from skd_lib._core.format import percent, plain
from skd_lib.report.charts import Format, Series, bar_chart, line_chart
from skd_lib.report.series import groups, smoothed, thinned
from skd_lib.results import Course, Moment, Setting, Specdec

_SMOOTHED_FROM = 20
"""Points from which on a noisy curve is drawn with its moving mean."""
_DOTS = 40
"""Points up to which each is marked."""
_MOMENT_KINDS: dict[Moment, str] = {"before": "neutral", "after": "student"}


class Figure(NamedTuple):
    """A chart with its words; `legend` holds CSS classes and names of its marks."""

    title: str
    note: str
    chart: Markup
    legend: Sequence[tuple[str, str]] = ()


def learning_curves(course: Course) -> list[Figure]:
    """Draw the losses and the sampler's figures over the training."""
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


def draft_figures(specdec: Mapping[Moment, Specdec]) -> list[Figure]:
    """Draw acceptance by position, and speed by draft length at each temperature and batch size."""
    legend = [(_MOMENT_KINDS[moment], f"{moment} distillation") for moment in specdec]
    found = []
    rates = {moment: draft.acceptance_by_position for moment, draft in specdec.items()}
    longest = max(map(len, rates.values()), default=0)
    if longest:
        places = [
            (str(at + 1), [(_MOMENT_KINDS[moment], of[at]) for moment, of in rates.items() if at < len(of)])
            for at in range(longest)
        ]
        note = "Share of drafts accepted at each position of a block, given that all before them were."
        found.append(Figure("Acceptance by position", note, bar_chart(places, label=note, number=percent), legend))
    for setting in dict.fromkeys((s.temperature, s.batch_size) for draft in specdec.values() for s in draft.settings):
        lines = [
            line
            for moment, draft in specdec.items()
            for each in draft.settings
            if (each.temperature, each.batch_size) == setting
            for line in _by_length(_MOMENT_KINDS[moment], each)
        ]
        if lines:
            decoding = "greedy" if setting[0] == 0 else f"temperature {setting[0]:g}"
            title = f"Speed-up by draft length: {decoding}, batch {setting[1]}"
            note = "Over the teacher alone, by tokens drafted for each of its calls. Dots: measured. Dashed: in theory."
            chart = line_chart(lines, label=f"{title}. {note}", number=plain, from_zero=True)
            found.append(Figure(title, note, chart, legend))
    return found


def _by_length(kind: str, setting: Setting) -> list[Series]:
    theory = [(each.gamma, each.theoretical_speedup) for each in setting.lengths]
    measured = [(each.gamma, each.timed.speedup) for each in setting.lengths if each.timed is not None]
    return [
        Series(name, [gamma for gamma, _ in points], [speedup for _, speedup in points], dots=dots)
        for name, points, dots in ((f"{kind} theory", theory, False), (kind, measured, True))
        if points
    ]


def _noisy(kind: str, steps: Sequence[int], values: Sequence[float]) -> list[Series]:
    """Draw a curve that jumps from step to step: its points behind, its moving mean in front."""
    steps, values = thinned(steps, values)
    if len(values) < _SMOOTHED_FROM:
        return [Series(kind, steps, values, dots=True)]
    return [Series(f"{kind} faint", steps, values), Series(kind, steps, smoothed(values, max(3, len(values) // 10)))]
