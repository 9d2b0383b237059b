"""The figures of a run: what they show, what their files hold, and what they say where something is missing."""

from __future__ import annotations

import csv
import io
from urllib.parse import unquote

import pytest

from skd_lib.evaluation.statistics import wilson_interval
from skd_lib.report.charts import Axis, Series
from skd_lib.report.figure import TABLE_ROWS, Figure, figure
from skd_lib.report.figures import draft_figures, learning_curves, time_axis
from skd_lib.report.summary import Summary
from skd_lib.results import Course, Specdec


def rows(found: Figure) -> list[dict[str, str]]:
    """The figure's CSV file."""
    return list(csv.DictReader(io.StringIO(unquote(found.file.partition(",")[2]))))


def curves(course: Course) -> dict[str, Figure]:
    return {found.title: found for found in learning_curves(course)}


def test_validation_loss_is_drawn_against_steps_tokens_and_time(summary: Summary) -> None:
    found = curves(summary.course)
    assert list(found)[:3] == ["Loss by step", "Validation loss against tokens", "Validation loss against time"]
    against_tokens = rows(found["Validation loss against tokens"])
    assert [float(row["positions through both models"]) for row in against_tokens] == [0, 7000, 14_000, 21_000]
    last = {name: float(value) for name, value in rows(found["Validation loss against time"])[-1].items()}
    assert last == {
        "time of training (minutes)": 10,
        "validation": 1.6,
        "validation, low": pytest.approx(1.44),
        "validation, high": pytest.approx(1.76),
    }
    assert "95% interval over the validation examples" in found["Loss by step"].note


def test_a_run_without_intervals_and_costs_says_so(summary: Summary) -> None:
    spent = ("validation_half", "validation_tokens", "validation_student_tokens", "validation_teacher_tokens")
    old = summary.course.model_copy(update=dict.fromkeys((*spent, "validation_seconds"), ()))
    found = curves(old)
    assert "This run has no intervals" in found["Loss by step"].note
    for title in ("Validation loss against tokens", "Validation loss against time"):
        assert "its version did not record it" in found[title].missing
        assert not found[title].chart


def test_a_run_without_any_course_says_so() -> None:
    assert {found.title: found.missing for found in learning_curves(Course())} == {
        "Loss by step": "No course of the training was recorded.",
        "Validation loss against tokens": "No validation was recorded.",
        "Validation loss against time": "No validation was recorded.",
    }


def test_acceptance_has_the_interval_of_its_tests() -> None:
    wait = {"first_token": {"p50": 1, "p90": 1, "p99": 1}}
    timed = {
        "speedup": 1.5,
        "tokens_per_second": 9,
        "acceptance_rate": 0.5,
        "acceptance_by_position": [0.5, 0.25],
        "tested_by_position": [40, 20],
        "tokens_per_teacher_call": 2,
        "tokens": 9,
        "latency": wait,
        "ties": 0,
    }
    theory = dict.fromkeys(("theoretical_speedup", "theoretical_speedup_iid", "expected_tokens_per_teacher_call"), 1.6)
    setting = {
        "temperature": 0,
        "batch_size": 1,
        "prompts": 4,
        "best_gamma": 2,
        "best_speedup": 1.5,
        "teacher_alone": {"tokens_per_second": 5, "latency": wait},
        "forwards": {"draft_seconds": 1, "draft_start_seconds": 1, "teacher_seconds": {}},
        "lengths": [{"gamma": 2, **theory, "timed": timed}],
    }
    headline = {"acceptance_rate": 0.5, "tokens_per_teacher_call": 2, "speedup": 1.5, "gamma": 2, "temperature": 0}
    values = {**headline, "batch_size": 1, "acceptance_by_position": [0.5, 0.25], "settings": [setting]}
    acceptance, speed = draft_figures({"after": Specdec.model_validate(values)})
    first = rows(acceptance)[0]
    ends = wilson_interval(0.5, 40)
    assert (float(first["after, low"]), float(first["after, high"])) == pytest.approx(
        (ends[0] / 100, ends[1] / 100), rel=1e-4
    )
    assert "Wilson's, over the tested drafts" in acceptance.note
    assert [row["after, measured"] for row in rows(speed)] == ["1.5"]
    unknown = draft_figures({"after": Specdec.model_validate({**values, "settings": []})})[0]
    assert "after, low" not in rows(unknown)[0]
    assert "Wilson" not in unknown.note
    bare = Specdec(acceptance_rate=0.5, tokens_per_teacher_call=2, speedup=1)
    assert draft_figures({"after": bare})[0].missing == "The benchmark did not record it."


def test_a_long_table_is_cut_and_its_file_is_not() -> None:
    values = [float(step) for step in range(1000)]
    one = figure("A, b", "Note.", [Series("s0", values, values, "y")], Axis("x"), Axis("y"))
    assert (one.name, one.total, len(one.rows), len(rows(one))) == ("a-b", 1000, TABLE_ROWS, 1000)
    assert (one.rows[0][0], one.rows[-1][0]) == ("0", "999")


def test_a_name_with_a_comma_or_a_formula_stays_one_cell() -> None:
    series = [Series("s0", [1], [2], name, joined=False) for name in ('a, "b"', "=1+1")]
    found = rows(figure("T", "Note.", series, Axis("x"), Axis("y")))
    assert [row[""] for row in found] == ['a, "b"', "'=1+1"]
    (row,) = rows(figure("T", "Note.", [Series("s0", [1], [2], "=1+1")], Axis("x"), Axis("y")))
    assert list(row) == ["x", "'=1+1"]


def test_units() -> None:
    assert [time_axis(longest, "time")[0].name for longest in (0.5, 100, 600, 20_000)] == [
        *("time (seconds)", "time (seconds)", "time (minutes)", "time (hours)")
    ]
