"""`skd generate`, on tiny models."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from skd_lib._core.terminal import visible
from tests.conftest import SaveTinyModel, Skd
from tests.support.local_runs import finished_run


@pytest.fixture
def models(tmp_path: Path, save_tiny_model: SaveTinyModel) -> tuple[Path, Path]:
    return save_tiny_model(tmp_path / "teacher", seed=2), save_tiny_model(tmp_path / "student", seed=1)


def test_a_draft_changes_no_word_of_the_answer(skd: Skd, models: tuple[Path, Path]) -> None:
    teacher, student = models
    alone = skd("generate", teacher, "Add 12 and 30.", "--max-new-tokens", "16")
    drafted = skd("generate", teacher, "Add 12 and 30.", "--draft", student, "--max-new-tokens", "16")
    assert alone.returncode == drafted.returncode == 0
    answer, _, figures = drafted.stdout.rstrip("\n").rpartition("\n")
    assert alone.stdout == answer + "\n"
    assert "of them drafted" in figures
    assert "accepted" not in figures  # no legend of colours where there are none


def test_the_prompt_may_come_from_standard_input(
    skd: Skd, models: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("Add 12 and 30.\n"))
    piped = skd("generate", models[0], "--max-new-tokens", "8")
    assert piped.stdout == skd("generate", models[0], "Add 12 and 30.", "--max-new-tokens", "8").stdout


def test_a_conversation_goes_on_until_an_empty_message(
    skd: Skd, models: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    for end in ("\n", ""):  # an empty message, and the end of the input
        monkeypatch.setattr("sys.stdin", io.StringIO(f"Hello\nAnd 30?\n{end}"))
        done = skd("generate", models[0], "--chat", "--max-new-tokens", "8")
        assert done.returncode == 0
        assert done.stdout.count(">") >= 3
        assert "Aborted" not in done.stderr


def test_prompts_of_a_file_are_answered_as_lines_of_json(skd: Skd, models: tuple[Path, Path], tmp_path: Path) -> None:
    teacher, student = models
    (tmp_path / "prompts.txt").write_text("Add 12 and 30.\nHello\n")
    options = ("--prompts", tmp_path / "prompts.txt", "--max-new-tokens", "8")
    done = skd("generate", teacher, "--draft", student, *options, "--json")
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert [answer["prompt"] for answer in answers] == ["Add 12 and 30.", "Hello"]
    for answer in answers:
        assert answer["tokens"] == 8
        assert answer["truncated"]
        assert answer["drafted"] + answer["replaced"] <= answer["tokens"]
    shown = skd("generate", teacher, *options).stdout
    first, second = (visible(answer["answer"]) for answer in answers)
    assert shown == f"> Add 12 and 30.\n{first}\n\n> Hello\n{second}\n"


def test_a_runs_model_is_asked_as_it_was_trained(skd: Skd, tmp_path: Path, save_tiny_model: SaveTinyModel) -> None:
    student = finished_run(tmp_path, "demo", save_tiny_model) / "student"
    done = skd("generate", student, "Hello", "--max-new-tokens", "8")
    assert "note: prompts go into the template of run demo: Translate: {source}\\n" in done.stderr
    named = tmp_path / "task.yaml"
    named.write_text(json.dumps({"prompt": "Translate: {source}\n"}))
    elsewhere = student.resolve()
    named_task = skd("generate", elsewhere, "Hello", "--task", named, "--max-new-tokens", "8")
    assert named_task.stderr == ""
    assert done.stdout == named_task.stdout
    plain = skd("generate", elsewhere, "Hello", "--max-new-tokens", "8")
    assert plain.stdout != done.stdout
    assert skd("generate", student, "Hello", "--raw", "--max-new-tokens", "8").stderr == ""


def test_an_answer_ends_at_a_stop_string(skd: Skd, models: tuple[Path, Path], tmp_path: Path) -> None:
    whole = skd("generate", models[0], "Hello", "--max-new-tokens", "16").stdout
    stop = whole.strip()[3:5]
    (tmp_path / "task.yaml").write_text(f"stop: [{json.dumps(stop)}]\n")
    done = skd("generate", models[0], "Hello", "--task", tmp_path / "task.yaml", "--max-new-tokens", "16", "--json")
    answer = json.loads(done.stdout)
    assert stop in answer["answer"]
    assert answer["tokens"] < 16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["", "--max-new-tokens", "8"], "the prompt is empty"),
        (["hello", "--chat"], "messages are asked for"),
        (["--raw", "--chat"], "needs the chat template"),
        (["hello", "--prompts", "some.txt"], "leave out PROMPT 'hello'"),
        (["--prompts", "missing.txt"], "missing.txt: cannot read"),
        (["hello", "--task", "gsm9k"], "gsm9k"),
        (["--chat", "--json"], "leave out --json or --chat"),
        (["hello", "--raw", "--task", "gsm8k"], "--task: it has no effect"),
    ],
)
def test_what_cannot_be_is_said(skd: Skd, models: tuple[Path, Path], arguments: list[str], message: str) -> None:
    done = skd("generate", models[0], *arguments)
    assert done.returncode == 2
    assert message in done.stderr
