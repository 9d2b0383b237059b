"""The charts of a comparison: what each variant reached, for how many tokens and seconds, and how it got there."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import fmean

from skd_lib._core.format import count, percent
from skd_lib.comparison.table import Comparison, TrialResult, VariantResult, VariantScore
from skd_lib.config import LOWER_IS_BETTER
from skd_lib.evaluation.statistics import t_interval
from skd_lib.report.charts import SHAPES, Axis, Series
from skd_lib.report.figure import Figure, figure, missing
from skd_lib.report.figures import LOSS, time_axis
from skd_lib.report.names import metric_name
from skd_lib.results import Course

SHOWN = 12
"""Variants that are told apart by colour, dash and shape: the reference, then those of the best scores."""
_DASHES = ("", "dashed", "dashdot", "dotted")
_OTHERS = "neutral faint"
Styles = Mapping[str, tuple[str, str]]
_SHOWN_NOTE = f" The reference and the best {SHOWN - 1} others are labelled; the numbers have all."
Spent = Callable[[VariantResult], float | None]


def figures(comparison: Comparison) -> list[Figure]:
    """Draw quality against tokens and time, then the courses, then acceptance by position."""
    metric = comparison.metrics[0] if comparison.metrics else ""
    styles = _styles(comparison, metric)
    seconds = [each.costs["seconds"] for each in comparison.variants if "seconds" in each.costs]
    clock, unit = time_axis(max(seconds, default=0.0), "time of training")
    return [
        _scores(comparison, metric, styles, "tokens", _positions, Axis("positions through both models", count, True)),
        _scores(
            *(comparison, metric, styles, "time"),
            lambda each: each.costs["seconds"] / unit if each.costs.get("seconds") else None,
            Axis(clock.name, clock.number, from_zero=True),
        ),
        *_courses(comparison, styles),
        _acceptance(comparison, styles),
    ]


def cheapest(points: Iterable[tuple[str, float, float]]) -> list[str]:
    """Return the names of the points, (name, cost, quality), that no other beats at the same cost or a lower one."""
    found, best = [], float("-inf")
    for name, _, score in sorted(points, key=lambda point: (point[1], -point[2])):
        if score > best:
            found.append(name)
            best = score
    return found


def quality(variant: VariantResult, metric: str) -> float:
    """Return a variant's mean score, negative where a lower one is better."""
    return variant.scores[metric].mean * (-1 if metric in LOWER_IS_BETTER else 1)


def _positions(variant: VariantResult) -> float | None:
    counts = [variant.costs[name] for name in ("student_tokens", "teacher_tokens") if name in variant.costs]
    return sum(counts) if counts else None


def _styles(comparison: Comparison, metric: str) -> Styles:
    """Return the styles of the variants that are told apart."""
    known = [each for each in comparison.variants if each.scores]
    by_score = sorted(known, key=lambda each: -quality(each, metric) if metric in each.scores else math.inf)
    first = [each for each in known if each.variant == comparison.reference]
    names = [each.variant for each in [*first, *(each for each in by_score if each not in first)]][:SHOWN]
    shapes = list(SHAPES)
    return {
        name: (
            f"s{at % len(shapes)} {_DASHES[at % len(_DASHES)]}{' hollow' if at >= len(shapes) else ''}",
            shapes[at % len(shapes)],
        )
        for at, name in enumerate(names)
    }


def _scores(
    comparison: Comparison,
    metric: str,
    styles: Styles,
    what: str,
    spent: Spent,
    x: Axis,
) -> Figure:
    """Draw each variant's mean score against what a run of it spent, and the best that each amount buys."""
    name = metric_name(metric) or "score"
    title = f"{name[0].upper()}{name[1:]} against {what}"
    points = {
        each.variant: (cost, each.scores[metric])
        for each in comparison.variants
        if metric in each.scores and (cost := spent(each)) is not None
    }
    if not points:
        return missing(title, f"No run has both a score and its {what}.")
    series = []
    drawn = [each for each in comparison.variants if each.variant in points]
    best = cheapest((each.variant, points[each.variant][0], quality(each, metric)) for each in drawn)
    if len(best) > 1:
        costs, means = [points[name][0] for name in best], [points[name][1].mean for name in best]
        series.append(Series("neutral dotted", costs, means))
    if (teacher := comparison.teacher.get(metric)) and _is_near(teacher.score, points.values()):
        ends = [0.0, max(cost for cost, _ in points.values())]
        series.append(Series("teacher thin", ends, [teacher.score] * 2, label="teacher"))
    for name, (cost, score) in points.items():
        kind, shape = styles.get(name, (_OTHERS, "circle"))
        label = name if name in styles else ""
        interval = {"low": [score.low], "high": [score.high]}
        series.append(Series(kind, [cost], [score.mean], name, label, shape=shape, joined=False, **interval))
    note = f"Dotted: the best score for what was spent, by {', '.join(best)}." if len(best) > 1 else ""
    if len(best) == 1:
        note = f"{best[0]} has the best score and spent least." if len(drawn) > 1 else "There is one variant."
    if teacher:
        note += f" The teacher has {teacher.score:.1f}."
    return figure(title, note + _left(comparison, styles), series, x, Axis(metric_name(metric)))


def _is_near(score: float, points: Iterable[tuple[float, VariantScore]]) -> bool:
    """Return True if a score is near enough to the variants' to be drawn without flattening them."""
    ends = [end for _, each in points for end in (each.low, each.high)]
    span = max(ends) - min(ends)
    return min(ends) - span <= score <= max(ends) + span


def _left(comparison: Comparison, styles: Styles) -> str:
    return _SHOWN_NOTE if sum(bool(each.runs) for each in comparison.variants) > len(styles) else ""


def _courses(comparison: Comparison, styles: Styles) -> list[Figure]:
    """Draw the validation losses, which are comparable where the objective is the same, against tokens and time."""
    objectives = {trial.objective: None for trial in comparison.trials if trial.course and trial.course.validation_loss}
    if not objectives:
        return [missing("Validation loss against tokens", "No run has recorded its validations.")]
    found = []
    for objective in objectives:
        trials = [trial for trial in comparison.trials if trial.objective == objective and trial.course]
        of = f" ({objective})" if objective else ""
        found += _course(comparison, trials, styles, of)
    return found


def _course(comparison: Comparison, trials: Sequence[TrialResult], styles: Styles, of: str) -> list[Figure]:
    titles = f"Validation loss against tokens{of}", f"Validation loss against time{of}"
    told = [trial for trial in trials if trial.course and trial.course.validation_seconds]
    if not told:
        return [missing(title, "The runs do not say what had been spent before each validation.") for title in titles]
    longest = max(trial.course.validation_seconds[-1] for trial in told if trial.course)
    clock, unit = time_axis(longest, "time of training")
    note = "Mean of the runs at each validation."
    if of:
        note += " Losses of other objectives are not on this scale."
    ways: tuple[tuple[Callable[[Course], list[float]], Axis], ...] = (
        (_both, Axis("positions through both models", count)),
        (lambda course: [seconds / unit for seconds in course.validation_seconds], clock),
    )
    return [
        figure(title, note + _left(comparison, styles), _lines(told, styles, spent), x, LOSS)
        for title, (spent, x) in zip(titles, ways, strict=True)
    ]


def _both(course: Course) -> list[float]:
    both = zip(course.validation_student_tokens, course.validation_teacher_tokens, strict=True)
    return [student + teacher for student, teacher in both]


def _lines(trials: Sequence[TrialResult], styles: Styles, spent: Callable[[Course], list[float]]) -> list[Series]:
    """Draw a line a variant; those without a style of their own first, behind."""
    names = sorted(dict.fromkeys(trial.variant for trial in trials), key=lambda name: name in styles)
    lines = []
    for name in names:
        courses = [trial.course for trial in trials if trial.variant == name and trial.course]
        points = min(len(course.validation_loss) for course in courses)
        xs = [fmean(each) for each in zip(*(spent(course)[:points] for course in courses), strict=True)]
        losses = list(zip(*(course.validation_loss[:points] for course in courses), strict=True))
        ends = _ends(courses, losses)
        kind, shape = styles.get(name, (_OTHERS, ""))
        label = name if name in styles else ""
        low, high = ([end[side] for end in ends] for side in (0, 1))
        means = [fmean(each) for each in losses]
        lines.append(Series(kind, xs, means, name, label, low, high, shape if points <= 40 else ""))
    return lines


def _ends(courses: Sequence[Course], losses: Sequence[Sequence[float]]) -> list[tuple[float, float]]:
    """Return the intervals of the means: over seeds, of one run over its validation examples; none if unknown."""
    if len(courses) > 1:
        return [t_interval(each) for each in losses]
    halves = courses[0].validation_half
    return [(loss - half, loss + half) for (loss,), half in zip(losses, halves, strict=False)]


def _acceptance(comparison: Comparison, styles: Styles) -> Figure:
    title = "Acceptance by position"
    lines = []
    for name, (kind, shape) in styles.items():
        runs = [trial.acceptance_by_position for trial in comparison.trials if trial.variant == name]
        runs = [rates for rates in runs if rates]
        if not runs:
            continue
        rates = list(zip(*(each[: min(map(len, runs))] for each in runs), strict=True))
        ends = [t_interval(each) for each in rates] if len(runs) > 1 else []
        low, high = ([min(max(end[side], 0.0), 1.0) for end in ends] for side in (0, 1))
        means = [fmean(each) for each in rates]
        places = range(1, len(means) + 1)
        lines.append(Series(kind, places, means, name, name, low, high, shape))
    if not lines:
        return missing(title, "The students were not measured as drafts: set `drafts: true` in the comparison's file.")
    note = "Share of drafts accepted at each position of a block, given that all before it were."
    if not any(line.low for line in lines):
        note += " No interval: there is one seed."
    place = Axis("position in the block", lambda value: f"{value:.0f}", whole=True)
    return figure(title, note, lines, place, Axis("share accepted", percent, from_zero=True))
