"""What the student is worth against its teacher: quality, speed, size, and what it saves as a draft.

Leviathan et al. 2023 (arXiv 2211.17192): with a draft that costs c teacher tokens a token, and a verification that
costs v, speculative decoding is E / (gamma c + v) times as fast as the teacher alone, where E is the tokens that a
block of gamma drafted ones yields. All of these are measured, so the largest draft that pays can be named
(`skd_lib.specdec.theory.break_even`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from pydantic import Field

from skd_lib._core.format import TextTable, count, plain
from skd_lib.config import LOWER_IS_BETTER
from skd_lib.report.names import metric_name
from skd_lib.results import MOMENTS, Figures, Moment, Role, Specdec

if TYPE_CHECKING:
    from skd_lib.report.summary import Summary

COLUMNS = ("", "teacher", "student before", "student after", "share")
TITLE = "What the student is worth"
_ROLES: tuple[Role, ...] = ("teacher", "student_before", "student_after")


class Worth(Figures):
    """The headline figures of a student; None where something was not measured.

    Tokens a second are those of one model answering by itself, at the benchmark's first temperature and batch size.
    """

    quality_kept: float | None = Field(None, description="The student's score over the teacher's.")
    gap_closed: float | None = Field(None, description="Share of the way to the teacher that distillation went.")
    student_tokens_per_second: float | None = None
    teacher_tokens_per_second: float | None = None
    relative_speed: float | None = Field(None, description="The student's tokens a second over the teacher's.")
    student_parameters: int | None = None
    teacher_parameters: int | None = None
    relative_size: float | None = Field(None, description="The student's parameters over the teacher's.")
    drafted_speedup: float | None = Field(
        None, description="Best measured speed-up of speculative decoding; None where the draft is too large for one."
    )
    break_even_parameters: int | None = Field(
        None,
        description="Where the draft is too large: size below which one that is accepted as often would pay here, if "
        "its cost goes with its size; 0: not even a draft that costs nothing would.",
    )

    def figures(self) -> dict[str, float]:
        """Return what was measured, by name."""
        return {name: float(value) for name, value in self if value is not None}


def worth_of(summary: Summary) -> Worth:
    """Return the student's headline figures."""
    metric, draft, gap = summary.task_metric, summary.specdec.get("after"), summary.gap()
    teacher, student = (summary.models.get(role, {}).get(metric) for role in ("teacher", "student_after"))
    found = {} if draft is None else _figures_of_draft(draft)
    if gap is not None:
        found["gap_closed"] = gap.closed
    if teacher and student is not None and metric not in LOWER_IS_BETTER:
        found["quality_kept"] = student / teacher
    return Worth.model_validate(found)


def _figures_of_draft(draft: Specdec) -> dict[str, float | None]:
    speeds = draft.draft_only_tokens_per_second, draft.teacher_only_tokens_per_second
    sizes = draft.draft_parameters, draft.teacher_parameters
    found: dict[str, float | None] = {
        "student_tokens_per_second": speeds[0],
        "teacher_tokens_per_second": speeds[1],
        "relative_speed": _ratio(*speeds),
        "student_parameters": sizes[0],
        "teacher_parameters": sizes[1],
        "relative_size": _ratio(*sizes),
    }
    speedup = draft.best_speedup or draft.speedup
    if speedup > 1 and not draft.is_unsure:
        found["drafted_speedup"] = speedup
    elif draft.draft_parameters and draft.break_even is not None and draft.break_even < 1:
        found["break_even_parameters"] = round(draft.draft_parameters * max(draft.break_even, 0.0))
    return found


def worth_table(summary: Summary) -> TextTable:
    """Return the figures as a table: one row a figure, one column a model."""
    worth, metric = summary.worth(), summary.task_metric
    scores = [summary.models.get(role, {}).get(metric) for role in _ROLES]
    before = _of_draft(summary, "before", "draft_only_tokens_per_second")
    speeds = [worth.teacher_tokens_per_second, before, worth.student_tokens_per_second]
    sizes = [worth.teacher_parameters, _of_draft(summary, "before", "draft_parameters"), worth.student_parameters]
    rates = [None, *(_of_draft(summary, moment, "acceptance_rate") for moment in MOMENTS)]
    saved = [_of_draft(summary, moment, "tokens_per_teacher_call") for moment in MOMENTS]
    calls = [1.0 if any(saved) else None, *saved]
    rows = [
        [metric_name(metric), *_cells(scores, "{:.1f}".format), _share(worth.quality_kept)],
        ["tokens a second", *_cells(speeds, plain), _times(worth.relative_speed)],
        ["parameters", *_cells(sizes, count), _share(worth.relative_size)],
        ["drafts accepted", *_cells(rates, "{:.1%}".format), ""],
        ["tokens a teacher call", *_cells(calls, "{:.2f}".format), ""],
    ]
    return TextTable(TITLE, COLUMNS, [row for row in rows if any(row[1:])])


def changed_gap(closed: float) -> str:
    """Return what became of the gap between student and teacher, given the share of it that distillation closed."""
    return f"closed {closed:.0%} of the gap" if closed >= 0 else f"added {-closed:.0%} to the gap"


def worth_lines(summary: Summary) -> list[str]:
    """Return the figures in sentences."""
    worth, draft = summary.worth(), summary.specdec.get("after")
    found = {
        f"{_share(worth.quality_kept)} of the teacher's {metric_name(summary.task_metric)}": worth.quality_kept,
        f"{_times(worth.relative_speed)} its tokens a second by itself": worth.relative_speed,
        f"{_share(worth.relative_size)} of its parameters": worth.relative_size,
    }
    known = [text for text, value in found.items() if value is not None]
    lines = [f"The student has {', '.join(known)}."] if known else []
    lines += _cautions(summary)
    if worth.gap_closed is not None:
        lines.append(f"Distillation {changed_gap(worth.gap_closed)} to the teacher.")
    return [" ".join(lines), *(_draft_lines(worth, draft) if draft else [])]


def _cautions(summary: Summary) -> list[str]:
    """Return what makes the other figures look better than they are."""
    metric = summary.task_metric
    teacher, before, after = (summary.models.get(role, {}).get(metric) for role in _ROLES)
    found, name, sign = [], metric_name(metric), -1 if metric in LOWER_IS_BETTER else 1
    if teacher is not None and before is not None and sign * teacher <= sign * before:
        scores = f"{name} {_score(teacher)} against {_score(before)}"
        found.append(f"The teacher is no better than the student was before distillation: {scores}.")
    if after is not None and (lost := summary.score_lost()) is not None:
        found.append(f"Distillation made the student worse: {name} {_score(lost)} before, {_score(after)} after.")
    return found


def _draft_lines(worth: Worth, draft: Specdec) -> list[str]:
    first = f"As a draft it saves the teacher {1 - 1 / draft.tokens_per_teacher_call:.0%} of its calls."
    if worth.drafted_speedup is not None:
        best = f", with {draft.best_gamma} tokens drafted a time" if draft.best_gamma else ""
        return [f"{first} Speculative decoding is {_times(worth.drafted_speedup)} as fast as the teacher alone{best}."]
    if draft.is_unsure:
        return [f"{first} These passes cannot tell whether speculative decoding is faster than the teacher alone."]
    if worth.break_even_parameters is None:
        return [f"{first} Speculative decoding was not faster than the teacher alone here."]
    if not worth.break_even_parameters:
        return [
            f"{first} No draft accepted as often makes it faster here: checking a block takes longer than it saves."
        ]
    teacher = worth.teacher_parameters
    share = f" ({worth.break_even_parameters / teacher:.0%} of the teacher)" if teacher else ""
    return [
        f"{first} It is too large to make the teacher faster here: a draft accepted as often pays below about "
        f"{count(worth.break_even_parameters)} parameters{share}, by the measured times of both models."
    ]


def _score(value: float) -> str:
    return f"{value:.1f}" if abs(value) < 1e6 else f"{value:.3g}"


def _of_draft(summary: Summary, moment: Moment, name: str) -> float | None:
    return getattr(summary.specdec.get(moment), name, None)


def _ratio(value: float | None, whole: float | None) -> float | None:
    return value / whole if value is not None and whole else None


def _cells(values: Iterable[float | None], text: Callable[[float], str]) -> list[str]:
    return ["" if value is None else text(value) for value in values]


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"


def _times(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}x"
