from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import GenerationConfig

from skd_lib.models.vocabulary import check_compatible
from tests.conftest import SaveTinyModel


@pytest.fixture
def teacher(tmp_path: Path, save_tiny_model: SaveTinyModel) -> Path:
    return save_tiny_model(tmp_path / "teacher", hidden=64)


@pytest.fixture
def student(tmp_path: Path, save_tiny_model: SaveTinyModel) -> Path:
    return save_tiny_model(tmp_path / "student", seed=1)


def edit_vocabulary(folder: Path, changes: dict[str, str]) -> None:
    path = folder / "tokenizer.json"
    state = json.loads(path.read_text())
    vocab = state["model"]["vocab"]
    state["model"]["vocab"] = {changes.get(token, token): id_ for token, id_ in vocab.items()}
    state["model"]["merges"] = [
        merge for merge in state["model"]["merges"] if not {*merge, "".join(merge)} & set(changes)
    ]
    path.write_text(json.dumps(state))


def test_same_tokenizer_fits(teacher: Path, student: Path) -> None:
    assert check_compatible(teacher, student) == []


def test_other_architecture_fits(teacher: Path, tmp_path: Path, save_tiny_model: SaveTinyModel) -> None:
    assert check_compatible(teacher, save_tiny_model(tmp_path / "other", "gemma3")) == []


def test_padded_vocabularies_fit(tmp_path: Path, teacher: Path, save_tiny_model: SaveTinyModel) -> None:
    padded = save_tiny_model(tmp_path / "padded", vocab_size=384)
    assert check_compatible(teacher, padded) == check_compatible(padded, teacher) == []


def test_different_tokens_are_shown(teacher: Path, student: Path) -> None:
    vocab = json.loads((teacher / "tokenizer.json").read_text())["model"]["vocab"]
    last = {token: id_ for token, id_ in vocab.items() if id_ >= 312}
    edit_vocabulary(student, {token: f"<{id_}>" for token, id_ in last.items()})
    (error,) = check_compatible(teacher, student)
    assert "differ in 8 of 320 ids" in error.what
    shown = [id_ for token, id_ in last.items() if f"{id_} is {token!r} for the teacher, '<{id_}>'" in error.what]
    assert len(shown) == 5
    assert str(teacher) in error.where
    assert str(student) in error.where
    assert "one model family" in error.hint


def test_different_end_of_sequence(teacher: Path, student: Path) -> None:
    GenerationConfig(eos_token_id=[2, 3]).save_pretrained(student)
    (error,) = check_compatible(teacher, student)
    assert "end-of-sequence ids: [2] for the teacher, [2, 3] for the student" in error.what


def test_different_begin_of_sequence(teacher: Path, student: Path) -> None:
    path = student / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "bos_token": "<|im_start|>"}))
    (error,) = check_compatible(teacher, student)
    assert "begin-of-sequence id: 1 for the teacher, 3 for the student" in error.what


def test_tokenizer_larger_than_its_model(tmp_path: Path, teacher: Path, save_tiny_model: SaveTinyModel) -> None:
    small = save_tiny_model(tmp_path / "small", vocab_size=316)
    (error,) = check_compatible(teacher, small)
    assert "the student's tokenizer has 4 ids that its model has no row for (vocab_size 316): 316" in error.what
