"""`skd generate`, on tiny models."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from tests.conftest import SaveTinyModel, Skd


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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["", "--max-new-tokens", "8"], "the prompt is empty"),
        (["hello", "--chat"], "messages are asked for"),
        (["--raw", "--chat"], "needs the chat template"),
    ],
)
def test_what_cannot_be_is_said(skd: Skd, models: tuple[Path, Path], arguments: list[str], message: str) -> None:
    done = skd("generate", models[0], *arguments)
    assert done.returncode == 2
    assert message in done.stderr
