"""The summary of a run: its file, its table and its Markdown."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from skd_lib.errors import SkdError
from skd_lib.report.page import render_page
from skd_lib.report.render import render, sparkline, to_markdown
from skd_lib.report.summary import Summary, build_summary
from skd_lib.results import Comet, Course, PairedTest, Role, Scores, Specdec


def scores(chrf: float) -> Scores:
    flat = {
        "bleu": {"score": chrf / 4, "low": chrf / 4 - 0.5, "high": chrf / 4 + 0.5, "signature": "BLEU|tok:13a"},
        "chrf": {"score": chrf, "low": chrf - 1.5, "high": chrf + 1.25, "signature": "chrF2|nc:6"},
        "examples": 128.0,  # KFP turns integers into floats
        "seconds": 12.5,
    }
    return Scores.model_validate(flat)


@pytest.fixture
def summary() -> Summary:
    models: dict[Role, Scores] = {
        "student_after": scores(30.0),
        "teacher_base": scores(20.0),
        "teacher": scores(40.0),
        "student_before": scores(10.0),
    }
    before = {"acceptance_rate": 0.25, "tokens_per_teacher_call": 1.5, "speedup": 0.9, "seconds": 40.0, "tokens": 900}
    after = {"acceptance_rate": 0.625, "tokens_per_teacher_call": 3.0, "speedup": 1.375, "seconds": 30.0, "ties": 1}
    return build_summary(
        task_metric="chrf",
        scores=models,
        specdec={
            "before": Specdec.model_validate({**before, "gamma": 5.0, "temperature": 0.0}),
            "after": Specdec.model_validate({**after, "gamma": 5.0, "temperature": 0.0}),
        },
        course=Course(
            steps=tuple(range(1, 81)),
            rejection_rate=tuple(0.4 - 0.002 * step for step in range(80)),
            validation_steps=(0, 40, 80),
            validation_loss=(3.0, 2.0, 2.1),
        ),
        run_name="demo",
    )


def printed(summary: Summary, width: int = 80) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(render(summary))
    return console.export_text()


def test_the_fixed_part_of_the_file(summary: Summary, tmp_path: Path) -> None:
    summary.with_seconds({"distill": 390.0, "evaluate_teacher": 27.0}).write(tmp_path / "summary.json")
    kept = json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))
    assert list(kept)[:4] == ["task_metric", "models", "specdec", "seconds"]
    assert kept["task_metric"] == "chrf"
    assert kept["models"] == {
        "teacher_base": {"bleu": 5.0, "chrf": 20.0},
        "teacher": {"bleu": 10.0, "chrf": 40.0},
        "student_before": {"bleu": 2.5, "chrf": 10.0},
        "student_after": {"bleu": 7.5, "chrf": 30.0},
    }
    assert kept["specdec"]["after"]["acceptance_rate"] == 0.625
    assert kept["specdec"]["after"]["tokens_per_teacher_call"] == 3.0
    assert kept["specdec"]["after"]["speedup"] == 1.375
    assert kept["specdec"]["before"]["tokens"] == 900  # what else the benchmark measured stays
    assert kept["seconds"] == {
        "evaluate_teacher": 27.0,
        "evaluate_student": 25.0,
        "specdec_benchmark": 40.0,
        "distill": 390.0,
    }
    assert kept["intervals"]["teacher"]["chrf"] == [38.5, 41.25]
    assert kept["signatures"] == {"bleu": "BLEU|tok:13a", "chrf": "chrF2|nc:6"}
    assert kept["examples"]["teacher"] == 128
    assert Summary.read(tmp_path / "summary.json").to_dict() == kept


def test_headline_figures(summary: Summary) -> None:
    headline = summary.headline()
    assert headline["student_after/chrf"] == 30.0
    assert headline["teacher_base/bleu"] == 5.0
    assert headline["draft_before/acceptance_rate"] == 0.25
    assert headline["draft_after/speedup"] == 1.375
    assert headline["worth/quality_kept"] == 0.75
    assert len(headline) == 4 * 2 + 2 * 3 + len(summary.worth().figures())


def test_the_table_in_the_terminal(summary: Summary) -> None:
    text = printed(summary.with_seconds({"distill": 390.0}))
    assert max(len(line.rstrip()) for line in text.splitlines()) <= 80
    rows = [line.split() for line in text.splitlines()]
    # The deciding metric comes first, whatever the order of measuring.
    assert ["model", "chrF", "BLEU", "examples"] in rows
    assert ["student", "after", "30.0", "[28.5,", "31.2]", "7.5", "[7.0,", "8.0]", "128"] in rows
    assert ["chrF", "40.0", "10.0", "30.0", "75%"] in rows
    assert ["drafts", "accepted", "25.0%", "62.5%"] in rows
    assert text.index("total") < text.index("What the student is worth")  # which is last
    assert "0.391 -> 0.251 over 80 steps" in text
    assert "3.000 -> 2.100 (best 2.000 at step 40)" in text
    assert ["distill", "6", "min", "30", "s"] in [row[:5] for row in rows]
    assert "total" in text
    assert "on-policy" not in text


def test_markdown(summary: Summary) -> None:
    text = to_markdown(summary)
    assert text.startswith("# demo\n")
    assert "| student after | 30.0 [28.5, 31.2] | 7.5 [7.0, 8.0] | 128 |" in text
    assert "| before | 25.0% | 1.50 | 0.90x | yes |" in text
    assert "| after | 62.5% | 3.00 | 1.38x | yes, bar 1 rounding tie |" in text
    assert "5 tokens drafted a time, greedy" in text
    tables = [line for line in text.splitlines() if line.startswith("|")]
    assert all(line.endswith("|") for line in tables)


def test_a_rejection_rate_near_zero_is_told(summary: Summary) -> None:
    rare = summary.model_copy(update={"course": Course(steps=(1, 2), rejection_rate=(0.002, 0.001))})
    assert "close to on-policy distillation" in printed(rare, 200)
    on_policy = summary.model_copy(update={"course": Course(steps=(1, 2), rejection_rate=(0.0, 0.0))})
    assert "close to on-policy distillation" not in printed(on_policy, 200)


def test_what_was_not_measured_is_left_out() -> None:
    empty = build_summary(task_metric="accuracy", scores={}, specdec={}, course=Course())
    assert empty.headline() == {}
    assert printed(empty)
    assert to_markdown(empty).startswith("# Results")
    one = build_summary(task_metric="chrf", scores={"teacher": scores(40.0)}, specdec={}, course=Course())
    assert "gap" not in printed(one)


def comet(**found: object) -> Comet:
    return Comet.model_validate({"models": {}, "comparisons": {}, "missing": "", "seconds": 3.0, **found})


def test_scores_by_comet_stand_beside_the_others() -> None:
    found = {"teacher": {"score": 81.5, "low": 80.0, "high": 83.0, "signature": "comet|model:m|version:2.2.7"}}
    summary = build_summary(
        task_metric="comet",
        scores={"teacher": scores(40.0), "student_after": scores(30.0)},
        specdec={},
        course=Course(),
        comet=comet(models=found),
    )
    assert summary.headline()["teacher/comet"] == 81.5
    assert "student_after/comet" not in summary.headline()
    assert "| model | COMET | BLEU" in to_markdown(summary)
    assert "| teacher | 81.5 [80.0, 83.0] |" in to_markdown(summary)
    assert "COMET: comet|model:m|version:2.2.7" in printed(summary, 120)
    assert summary.missing == {}


def test_why_comet_is_missing_is_told() -> None:
    summary = build_summary(
        task_metric="chrf",
        scores={"teacher": scores(40.0)},
        specdec={},
        course=Course(),
        comet=comet(missing="org/model: cannot reach the hub\n  hint: check [the] network"),
    )
    told = "COMET is missing: org/model: cannot reach the hub hint: check [the] network"
    assert told in printed(summary, 120)
    assert f"- {told}" in to_markdown(summary)
    assert "comet" not in summary.models["teacher"]


def test_ties_and_sampling_are_shown(summary: Summary) -> None:
    draft = summary.specdec["after"]
    tied = summary.model_copy(update={"specdec": {"after": draft.model_copy(update={"ties": 2})}})
    assert "yes, bar 2 rounding ties" in printed(tied, 120)
    sampled = summary.model_copy(update={"specdec": {"after": draft.model_copy(update={"temperature": 0.5})}})
    assert "in distribution" in printed(sampled, 120)
    assert "temperature 0.5" in printed(sampled, 120)


def test_sparkline() -> None:
    assert sparkline([]) == ""
    assert sparkline([0.0, 0.0]) == "▁▁"
    assert sparkline([0.0, 0.5, 1.0]) == "▁▅█"
    assert sparkline([1.0] * 50 + [0.0] * 50, width=4) == "██▁▁"
    assert len(sparkline([0.1] * 7, width=5)) == 5


def test_a_file_that_is_no_summary_is_named(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text('{"task_metric": "chrf", "modles": {}}', encoding="utf-8")
    with pytest.raises(SkdError, match="field `models`: this field is required") as caught:
        Summary.read(tmp_path / "summary.json")
    assert "summary.json" in str(caught.value)


def test_what_the_data_lost_is_told(summary: Summary) -> None:
    assert "Left out" not in printed(summary)
    assert "Rows left out" not in to_markdown(summary)
    losses = {
        "train": {"rows": 160.0, "lost": {"repeated": 9.0, "resembles a held-out row": 150.0}},
        "test": {"rows": 20, "lost": {}},
    }
    with_losses = Summary.model_validate(summary.to_dict() | {"losses": losses})
    assert "Left out of train: 159 (99%) of 160 rows" in printed(with_losses, width=200)
    assert "Left out of test" not in printed(with_losses)
    assert "| train | 160 | 159 (99%) | 9 repeated, 150 resemble a held-out row |" in to_markdown(with_losses)
    page = render_page(with_losses)
    assert "99% of train is left out." in page
    assert "150 resemble a held-out row" in page
    assert Summary.model_validate_json(with_losses.to_json()) == with_losses


def test_what_rests_on_few_examples_is_marked_and_said(summary: Summary) -> None:
    assert "†" not in to_markdown(summary)
    few = Scores.model_validate(
        {"chrf": {"score": 30, "low": 20, "high": 40, "caution": "3 examples are too few"}, "examples": 3}
    )
    test = PairedTest(a="student_after", b="student_before", metric="chrf", difference=20, low=20, high=20, n=3)
    small = build_summary(
        task_metric="chrf", scores={"student_after": few}, specdec={}, course=Course(), comparisons=[test]
    )
    assert Summary.model_validate(small.to_dict()) == small
    for shown in (to_markdown(small), printed(small, 200)):
        assert "30.0 [20.0, 40.0]†" in shown
        assert "† 3 examples are too few." in shown
        assert "Paired tests are withheld (under 20 examples)" in shown
