"""The page's charts of a run: how the training went, and how the student does as draft model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean

from skd_lib._core.format import count, decoding, percent
from skd_lib.evaluation.statistics import wilson_interval
from skd_lib.report.charts import Axis, Series
from skd_lib.report.figure import Figure, figure, missing
from skd_lib.report.series import groups, smoothed, thinned
from skd_lib.results import Course, Moment, Setting, Specdec

STEP = Axis("optimiser step", lambda value: f"{value:,.0f}", whole=True)
LOSS = Axis("loss (nats a token)")
UNTOLD = (
    "This run does not say how much had been computed before each validation: its version did not record it. "
    "Train again to see it."
)
_SMOOTHED_FROM = 20
"""Points from which on a noisy curve is drawn with its moving mean."""
_SHAPES_UP_TO = 40
"""Points up to which each is marked."""
_KINDS: dict[Moment, tuple[str, str]] = {"before": ("neutral dashed", "square"), "after": ("student", "circle")}


def time_axis(longest: float, what: str) -> tuple[Axis, float]:
    """Return an axis in seconds, minutes or hours, and the seconds of its unit."""
    units = {"hours": 3600, "minutes": 60, "seconds": 1}
    unit = next((unit for unit, seconds in units.items() if longest >= 3 * seconds), "seconds")
    return Axis(f"{what} ({unit})"), units[unit]


def learning_curves(course: Course) -> list[Figure]:
    """Draw the losses and the sampler's figures over the training."""
    return [_loss(course), *_spent(course), *_sampling(course)]


def _sampling(course: Course) -> list[Figure]:
    """Draw the sampler's figures; none of a method that does not sample."""
    sampler, training = course.steps, course.training_steps
    share = Axis("share of tested drafts", percent, from_zero=True)
    calls, length = Axis("tokens a call", from_zero=True), Axis("tokens", from_zero=True)
    curves: tuple[tuple[str, str, str, Sequence[int], Sequence[float], Axis], ...] = (
        ("Rejection rate", "Drafts that the teacher replaced", "teacher", sampler, course.rejection_rate, share),
        ("Tokens per teacher call", "While sampling", "teacher", sampler, course.tokens_per_teacher_call, calls),
        ("Response length", "Mean of the responses trained on", "neutral", training, course.response_length, length),
    )
    found = []
    for title, meaning, kind, steps, values, axis in curves:
        if values:
            parts = groups(values, 8)
            note = f"{meaning}: {axis.number(fmean(parts[0]))} → {axis.number(fmean(parts[-1]))}."
            lines = _noisy(kind, title.lower(), steps, values, mark="triangle")
            found.append(figure(f"{title} by step", note, lines, STEP, axis))
    return found


def _loss(course: Course) -> Figure:
    title, lines, note = "Loss by step", [], ""
    if course.training_loss:
        lines += _noisy("neutral dashed", "training", course.training_steps, course.training_loss, mark="square")
        lines[-1] = _labelled(lines[-1], "training")
    if course.validation_loss:
        losses = course.validation_loss
        best = min(range(len(losses)), key=losses.__getitem__)
        note = f"Validation {losses[0]:.3f} → {losses[-1]:.3f}, lowest {losses[best]:.3f}" + (
            f" at step {course.validation_steps[best]:,}, whose weights were kept." if best else " before training."
        )
        lines.append(_labelled(_validation(course, course.validation_steps), "validation"))
    if not lines:
        return missing(title, "No course of the training was recorded.")
    return figure(title, note + _interval_note(course), lines, STEP, LOSS)


def _spent(course: Course) -> list[Figure]:
    """Draw the validation loss against what had been computed: positions, and seconds."""
    titles = "Validation loss against tokens", "Validation loss against time"
    if not course.validation_loss:
        return [missing(title, "No validation was recorded.") for title in titles]
    if len(course.validation_seconds) != len(course.validation_loss):
        return [missing(title, UNTOLD) for title in titles]
    last = course.validation_tokens[-1], course.validation_student_tokens[-1], course.validation_teacher_tokens[-1]
    of_both = list(map(sum, zip(course.validation_student_tokens, course.validation_teacher_tokens, strict=True)))
    trained, student, teacher = map(count, last)
    clock, unit = time_axis(course.validation_seconds[-1], "time of training")
    return [
        figure(
            titles[0],
            f"{trained} response tokens were trained on; for these {student} positions went through the student and "
            f"{teacher} through the teacher, prompts included.",
            [_validation(course, of_both)],
            Axis("positions through both models", count),
            LOSS,
        ),
        figure(
            titles[1],
            "Sampling, loss and optimiser; without validation, checkpoints and loading.",
            [_validation(course, [seconds / unit for seconds in course.validation_seconds])],
            clock,
            LOSS,
        ),
    ]


def _validation(course: Course, xs: Sequence[float]) -> Series:
    known = len(course.validation_half) == len(course.validation_loss)
    halves = thinned(xs, course.validation_half)[1] if known else []
    xs, losses = thinned(xs, course.validation_loss)
    low = [loss - half for loss, half in zip(losses, halves, strict=True)] if known else []
    high = [loss + half for loss, half in zip(losses, halves, strict=True)] if known else []
    shape = "circle" if len(losses) <= _SHAPES_UP_TO else ""
    return Series("student", xs, losses, "validation", low=low, high=high, shape=shape)


def _interval_note(course: Course) -> str:
    if not course.validation_loss:
        return ""
    if course.validation_half:
        return " Whiskers or band: 95% interval over the validation examples."
    return " This run has no intervals: its version did not record them, or there is one validation example."


def draft_figures(specdec: Mapping[Moment, Specdec]) -> list[Figure]:
    """Draw acceptance by position, and speed by draft length at each temperature and batch size."""
    found = [_acceptance(specdec)]
    for setting in dict.fromkeys((s.temperature, s.batch_size) for draft in specdec.values() for s in draft.settings):
        lines = [
            line
            for moment, draft in specdec.items()
            for each in draft.settings
            if (each.temperature, each.batch_size) == setting
            for line in _by_length(moment, each)
        ]
        if lines:
            title = f"Speed-up by draft length: {decoding(setting[0])}, batch {setting[1]}"
            note = "Over the teacher alone. Marks: measured, the median of the turns. Thin lines: in theory."
            lengths = Axis("tokens drafted for each teacher call", whole=True)
            found.append(
                figure(title, note, lines, lengths, Axis("times as fast as the teacher alone", from_zero=True))
            )
    return found


def _acceptance(specdec: Mapping[Moment, Specdec]) -> Figure:
    title = "Acceptance by position"
    lines = [_by_position(moment, draft) for moment, draft in specdec.items() if draft.acceptance_by_position]
    if not lines:
        return missing(title, "The benchmark did not record it.")
    note = "Share of drafts accepted at each position of a block, given that all before them were."
    if all(line.low for line in lines):
        note += " Whiskers: 95%, Wilson's, over the tested drafts."
    place = Axis("position in the block", lambda value: f"{value:.0f}", whole=True)
    return figure(title, note, lines, place, Axis("share accepted", percent, from_zero=True))


def _by_position(moment: Moment, draft: Specdec) -> Series:
    kind, shape = _KINDS[moment]
    rates = draft.acceptance_by_position
    ends = [wilson_interval(rate, tests) for rate, tests in zip(rates, _tested(draft), strict=False) if tests]
    low, high = ([end[side] / 100 for end in ends] if len(ends) == len(rates) else [] for side in (0, 1))
    return Series(kind, range(1, len(rates) + 1), rates, moment, moment, low=low, high=high, shape=shape)


def _tested(draft: Specdec) -> Sequence[int]:
    """Return the number of tests behind each rate of the headline; nothing where it was not recorded."""
    for model in draft.served.drafts.values() if draft.served else ():
        if (counts := model.passes[0].counts) is not None:
            return counts.tested
    for setting in draft.settings:
        if (setting.temperature, setting.batch_size) == (draft.temperature, draft.batch_size):
            for length in setting.lengths:
                if length.gamma == draft.gamma and length.timed:
                    return length.timed.tested_by_position
    return ()


def _by_length(moment: Moment, setting: Setting) -> list[Series]:
    kind, shape = _KINDS[moment]
    theory = [(each.gamma, each.theoretical_speedup) for each in setting.lengths]
    measured = [(each.gamma, each.timed.speedup) for each in setting.lengths if each.timed is not None]
    found = []
    for name, points, mark in ((f"{moment}, theory", theory, ""), (f"{moment}, measured", measured, shape)):
        if points:
            xs, ys = zip(*points, strict=True)
            label = moment if mark or not measured else ""
            found.append(Series(kind if mark else f"{kind} thin", xs, ys, name, label, shape=mark))
    return found


def _noisy(kind: str, name: str, steps: Sequence[int], values: Sequence[float], mark: str) -> list[Series]:
    """Draw a curve that jumps from step to step: its points behind, its moving mean in front."""
    steps, values = thinned(steps, values)
    if len(values) < _SMOOTHED_FROM:
        return [Series(kind, steps, values, name, shape=mark)]
    means = smoothed(values, max(3, len(values) // 10))
    return [Series(f"{kind} faint", steps, values, name), Series(kind, steps, means)]


def _labelled(series: Series, label: str) -> Series:
    return Series(**{**vars(series), "label": label})
