"""The format of the data, one example as the model reads it, and what data without answers allow."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest

from skd_lib._core.terminal import Console
from skd_lib.config import RunConfig
from skd_lib.preflight import Check, PreflightReport
from tests.conftest import BOS, EOS, TURN
from tests.preflight.support import ROWS, check

TALKS = [
    {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": row["source"]},
            {"role": "assistant", "content": row["target"]},
            {"role": "user", "content": f"and again, number {number}?"},
            {"role": "assistant", "content": f"again, {row['target']}"},
        ]
    }
    for number, row in enumerate(ROWS)
]


def checked(values: dict[str, Any], tmp_path: Path, rows: list[dict[str, Any]]) -> PreflightReport:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    values["data"]["near_duplicate_threshold"] = 1
    return check(values, tmp_path)


def named(report: PreflightReport, name: str) -> Check:
    return next(found for found in report.checks if found.name == name)


@pytest.fixture
def talks(values: dict[str, Any]) -> dict[str, Any]:
    del values["task"]["prompt"]
    return values


def test_an_example_is_shown_with_the_tokens_that_are_trained_on(talks: dict[str, Any], tmp_path: Path) -> None:
    report = checked(talks, tmp_path, TALKS)
    assert report.errors() == []
    assert named(report, "format").what == "40 conversations, 2.0 answers each, all are trained on"
    shown = named(report, "example")
    number = int(shown.where.rpartition("row ")[2]) - 1
    first, second = TALKS[number]["messages"][2]["content"], TALKS[number]["messages"][4]["content"]
    assert shown.what == "".join(
        [
            f"{BOS}{TURN}system\nBe brief.{EOS}\n",
            f"{TURN}user\n{ROWS[number]['source']}{EOS}\n{TURN}assistant\n[[{first}{EOS}]]\n",
            f"{TURN}user\nand again, number {number}?{EOS}\n{TURN}assistant\n[[{second}{EOS}]]",
        ]
    )
    assert "64 examples" in named(report, "distill").what
    talks["data"]["assistant_turns"] = "last"
    report = checked(talks, tmp_path, TALKS)
    assert named(report, "format").what.endswith("the last is trained on")
    assert named(report, "example").what.count("[[") == 1
    assert "32 examples" in named(report, "distill").what


def test_trained_tokens_are_bold_in_a_terminal(talks: dict[str, Any], tmp_path: Path) -> None:
    report = checked(talks, tmp_path, TALKS)
    terminal, plain = io.StringIO(), io.StringIO()
    Console(file=terminal, force_terminal=True, width=200, color_system="standard").print(report.table())
    Console(file=plain, width=200).print(report.table())
    assert "\x1b[1;32m[[again, " in terminal.getvalue()
    assert "[[again, " in plain.getvalue()
    assert "\x1b" not in plain.getvalue()


def test_long_examples_are_shortened(values: dict[str, Any], tmp_path: Path) -> None:
    report = checked(values, tmp_path, [row | {"source": row["source"] + " x" * 3000} for row in ROWS])
    shown = named(report, "example").what
    assert len(shown) < 2000
    assert "characters) …" in shown


def test_messages_need_a_chat_template_and_no_prompt(values: dict[str, Any], tmp_path: Path) -> None:
    report = checked(values, tmp_path, TALKS)
    (warning,) = [found for found in report.checks if found.name == "format" and found.level == "warning"]
    assert "this template is not put around them" in warning.what
    values["task"]["chat_template"] = False
    report = checked(values, tmp_path, TALKS)
    assert [error.where for error in report.errors()] == ["task.chat_template"]


def test_tools_that_the_template_does_not_write_are_a_warning(talks: dict[str, Any], tmp_path: Path) -> None:
    tool = {"type": "function", "function": {"name": "look_up", "parameters": {}}}
    report = checked(talks, tmp_path, [talk | {"tools": [tool]} for talk in TALKS])
    warning = named(report, "train rows")
    assert (warning.level, warning.what.partition(" of ")[0]) == (
        "warning",
        "the chat template does not write the tools",
    )
    assert "40 have tools" in named(report, "format").what


@pytest.mark.parametrize(
    ("method", "options", "wrong"),
    [
        ("skd", {}, ""),
        ("seqkd", {}, ""),
        ("on_policy", {"on_policy_fraction": 1}, ""),
        ("on_policy", {"on_policy_fraction": 0.5}, "distill.method"),
        ("supervised_kd", {}, "distill.method"),
        ("skd_mixed", {}, "distill.method"),
    ],
)
def test_prompts_alone_are_for_methods_that_sample_every_response(
    values: dict[str, Any], tmp_path: Path, method: str, options: dict[str, Any], wrong: str
) -> None:
    values |= {"distill": {"method": method, **options}, "teacher_sft": {"enabled": False}}
    report = checked(values, tmp_path, [{"prompt": row["source"]} for row in ROWS])
    assert [error.where for error in report.errors()] == ([wrong] if wrong else [])
    if wrong:
        assert "`skd`" in named(report, "distill").hint
    else:
        assert named(report, "example").what.endswith("[[a response is sampled here]]")


def test_comet_and_comparisons_need_answers(values: dict[str, Any], tmp_path: Path) -> None:
    values |= {"teacher_sft": {"enabled": False}}
    values["task"]["metrics"] = ["chrf", "comet"]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"prompt": row["source"]}) + "\n" for row in ROWS))
    run = RunConfig.model_validate(values)
    report = check(values, tmp_path, variants=[run, run.model_copy(update={"seed": 1})], comet=False)
    assert [error.where for error in report.errors()] == ["task.metrics", "data.source"]


def test_fine_tuning_needs_answers(values: dict[str, Any], tmp_path: Path) -> None:
    values |= {"teacher_sft": {"enabled": True}, "student_init": {"mode": "sft"}}
    report = checked(values, tmp_path, [{"prompt": row["source"]} for row in ROWS])
    assert {error.where for error in report.errors()} == {"teacher_sft.enabled", "student_init.mode"}
