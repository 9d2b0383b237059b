"""What the student is worth: figures, table and sentences."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from skd_lib._core.format import count
from skd_lib.report.summary import Summary, build_summary
from skd_lib.report.worth import worth_lines, worth_table
from skd_lib.results import Course, PairedTest, Role, Scores, Specdec

ACCEPTED = {"acceptance_rate": 0.6, "tokens_per_teacher_call": 2.5, "speedup": 0.5, "gamma": 3}
MEASURED = {
    **ACCEPTED,
    "best_speedup": 0.6,
    "best_gamma": 2,
    "teacher_only_tokens_per_second": 10.0,
    "draft_only_tokens_per_second": 12.5,
    "teacher_parameters": 200_000_000,
    "draft_parameters": 150_000_000,
    "break_even": 0.4,
}


def summary(metric: str = "chrf", scores: tuple[float, float, float] = (40, 10, 30), **draft: float) -> Summary:
    roles: tuple[Role, ...] = ("teacher", "student_before", "student_after")
    models = {
        role: Scores.model_validate({metric: {"score": score, "low": score, "high": score}})
        for role, score in zip(roles, scores, strict=True)
    }
    drafts = {"after": Specdec.model_validate(draft)} if draft else {}
    return build_summary(task_metric=metric, scores=models, specdec=drafts, course=Course())


def test_the_figures() -> None:
    assert summary(**MEASURED).worth().figures() == {
        "quality_kept": 0.75,
        "gap_closed": pytest.approx(2 / 3),
        "student_tokens_per_second": 12.5,
        "teacher_tokens_per_second": 10,
        "relative_speed": 1.25,
        "student_parameters": 150_000_000,
        "teacher_parameters": 200_000_000,
        "relative_size": 0.75,
        "break_even_parameters": 60_000_000,
    }


def test_a_student_that_got_worse_added_to_the_gap() -> None:
    assert "Distillation closed 67% of the gap to the teacher." in worth_lines(summary())[0]
    assert "Distillation added 20% to the gap to the teacher." in worth_lines(summary(scores=(40, 20, 16)))[0]


@pytest.mark.parametrize(
    ("metric", "scores", "low", "high", "said"),
    [
        ("chrf", (40, 20, 16), -6.0, -1.0, "Distillation made the student worse: chrF 20.0 before, 16.0 after."),
        ("chrf", (40, 20, 16), -6.0, 1.0, ""),
        ("chrf", (40, 16, 20), 1.0, 6.0, ""),
        ("perplexity", (4, 5, 8), 1.0, 6.0, "Distillation made the student worse: perplexity 5.0 before, 8.0 after."),
        ("perplexity", (4, 8, 5), -6.0, -1.0, ""),
    ],
)
def test_a_student_that_distillation_made_worse_is_told_so(
    metric: str, scores: tuple[float, float, float], low: float, high: float, said: str
) -> None:
    pair = {"a": "student_after", "b": "student_before", "metric": metric, "n": 50}
    test = PairedTest.model_validate(
        {**pair, "difference": (low + high) / 2, "low": low, "high": high, "p_value": 0.04}
    )
    found = summary(metric, scores).model_copy(update={"comparisons": (test,)})
    assert found.score_lost() == (scores[1] if said else None)
    assert said in worth_lines(found)[0]
    assert ("worse" in worth_lines(found)[0]) == bool(said)
    few = found.model_copy(update={"comparisons": (test.model_copy(update={"p_value": None}),)})
    assert few.score_lost() is None


def test_a_teacher_that_is_no_better_than_the_student_was_is_told_so() -> None:
    said = worth_lines(summary(scores=(3, 66, 2)))[0]
    assert "The teacher is no better than the student was before distillation: chrF 3.0 against 66.0." in said
    assert "no better" not in worth_lines(summary())[0]
    untold = summary()
    models = {role: scores for role, scores in untold.models.items() if role != "student_after"}
    assert "no better" not in worth_lines(untold.model_copy(update={"models": models}))[0]
    assert "perplexity 1e+300 against 5.0" in worth_lines(summary("perplexity", (1e300, 5, 4)))[0]


def test_a_draft_that_pays_has_a_speedup_and_one_that_does_not_a_size() -> None:
    assert summary(**MEASURED).worth().drafted_speedup is None
    (_, said) = worth_lines(summary(**MEASURED))
    assert "saves the teacher 60% of its calls" in said
    assert "pays below about 60M parameters (30% of the teacher)" in said
    fast = summary(**MEASURED | {"best_speedup": 1.8, "break_even": 4.0})
    assert fast.worth().break_even_parameters is None
    assert "1.80x as fast as the teacher alone, with 2 tokens drafted a time" in worth_lines(fast)[1]


@pytest.mark.parametrize(
    ("share", "size", "said"), [(-0.5, 0, "No draft accepted as often"), (1.2, None, "not faster")]
)
def test_where_no_size_can_be_named(share: float, size: int | None, said: str) -> None:
    found = summary(**MEASURED | {"break_even": share})
    assert found.worth().break_even_parameters == size
    assert said in worth_lines(found)[1]


def test_of_a_perplexity_no_share_is_kept_but_a_gap_is_closed() -> None:
    worth = summary("perplexity", (10, 40, 20)).worth()
    assert worth.quality_kept is None
    assert worth.gap_closed == pytest.approx(2 / 3)
    assert summary("perplexity", (40, 10, 20)).worth().gap_closed is None


def test_the_table_has_what_was_measured() -> None:
    assert [row[0] for row in worth_table(summary()).rows] == ["chrF"]
    table = {row[0]: row[1:] for row in worth_table(summary(**MEASURED)).rows}
    assert table["tokens a second"] == ["10", "", "12.5", "1.25x"]
    assert table["parameters"] == ["200M", "", "150M", "75%"]
    assert table["tokens a teacher call"] == ["1.00", "", "2.50", ""]


def test_files_have_the_figures_and_older_ones_are_read(tmp_path: Path) -> None:
    file = tmp_path / "summary.json"
    summary(**MEASURED).write(file)
    assert json.loads(file.read_text())["worth"]["relative_speed"] == 1.25
    assert Summary.read(file) == summary(**MEASURED)
    summary(**ACCEPTED).write(file)  # as before these figures were measured
    older = Summary.read(file)
    assert older.worth().relative_speed is None
    assert "was not faster" in worth_lines(older)[1]


def test_counts_of_parameters() -> None:
    assert [count(number) for number in (7.25e9, 134_515_008, 16_400, 500, 12, 0)] == [
        "7.25B",
        "135M",
        "16.4k",
        "500",
        "12",
        "0",
    ]
