"""Tokenizers and special ids of teacher and student, against each other and the data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import GenerationConfig, PreTrainedTokenizerFast

from skd_lib.config import RunConfig, TaskConfig
from skd_lib.errors import SkdError
from skd_lib.evaluation.generate import generate
from skd_lib.models.files import load_tokenizer
from skd_lib.models.loading import load_model, save_model
from skd_lib.models.vocabulary import check_compatible, compare, eos_ids, pad_id, take_over_ends
from tests.conftest import SaveTinyModel
from tests.preflight.support import ROWS, check, edit_json, only
from tests.support.vocabularies import with_tokens


@pytest.fixture
def models(copies: tuple[Path, Path]) -> tuple[Path, Path]:
    """The models of these tests' runs, which are changed."""
    return copies


def test_models_with_different_tokenizers_are_refused(
    values: dict[str, Any], tmp_path: Path, save_tiny_model: SaveTinyModel
) -> None:
    student = save_tiny_model(tmp_path / "student")
    tokenizer = json.loads((student / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (student / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    found = only(check(values | {"student": str(student)}, tmp_path), "error")
    assert found.name == "tokenizers"
    assert "'a'" in found.what


def test_padded_vocabularies_of_different_size_are_fine(
    values: dict[str, Any], tmp_path: Path, save_tiny_model: SaveTinyModel
) -> None:
    student = save_tiny_model(tmp_path / "student", vocab_size=384)
    assert check(values | {"student": str(student)}, tmp_path).errors() == []


def test_vllm_wants_vocabularies_of_one_size(
    values: dict[str, Any], tmp_path: Path, save_tiny_model: SaveTinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("skd_lib.vllm.serve.on_gpu", lambda: False)
    served = values | {"specdec": {"engine": "vllm", "temperatures": [0.7]}}
    for pod, level in (("", "error"), ("10.0.0.1", "warning")):
        monkeypatch.setenv("KUBERNETES_SERVICE_HOST", pod)
        found = [each for each in check(served, tmp_path).checks if each.where == "specdec.temperatures"]
        assert [each.level for each in found] == [level]
        assert "temperature 0 only" in found[0].what
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "")
    served["specdec"]["temperatures"] = [0]
    student = save_tiny_model(tmp_path / "student", vocab_size=384)
    refused = only(check(served | {"student": str(student)}, tmp_path), "error")
    assert (refused.name, refused.where) == ("specdec", "specdec.engine")
    assert "vocab_size is 320 for the teacher and 384" in refused.what


def config(values: dict[str, Any]) -> RunConfig:
    return RunConfig.model_validate(values)


def pair(tmp_path: Path, save: SaveTinyModel, teacher: int, student: int) -> tuple[Path, Path]:
    return save(tmp_path / "a", vocab_size=teacher), save(tmp_path / "b", seed=1, vocab_size=student)


def answers(folder: Path) -> None:
    """It runs, with rows of different lengths."""
    task = TaskConfig(max_new_tokens=3, max_prompt_tokens=64)
    generate(load_model(folder, device="cpu"), load_tokenizer(folder), ["a", "a longer one"], task, batch_size=2)


PAIRS = {
    "added padding, teacher padded": (
        384,
        384,
        [],
        [],
        "[PAD]",
        "the tokenizers differ in 1 of 321 ids: 320 is unused",
    ),
    "added padding, teacher not padded": (320, 321, [], [], "[PAD]", ""),
    "a surplus id of the student": (384, 320, ["<image>"], ["<image>"], None, "1 ids that its model has no row for"),
    "a surplus id of both": (320, 320, ["<image>"], ["<image>"], None, "1 ids that its model has no row for"),
    "padding beyond the rows": (320, 320, [], [], "[PAD]", "1 ids that its model has no row for"),
}


@pytest.mark.parametrize("case", PAIRS)
def test_ids_that_no_text_makes_are_a_warning_and_run(
    case: str, values: dict[str, Any], tmp_path: Path, save_tiny_model: SaveTinyModel
) -> None:
    teacher_rows, student_rows, teacher_tokens, student_tokens, pad, warning = PAIRS[case]
    teacher, student = pair(tmp_path, save_tiny_model, teacher_rows, student_rows)
    with_tokens(teacher, *teacher_tokens)
    with_tokens(student, *student_tokens, pad=pad)
    assert check_compatible(teacher, student) == []
    report = check(values | {"teacher": str(teacher), "student": str(student)}, tmp_path)
    assert report.errors() == []
    warned = [found.what for found in report.checks if found.level == "warning"]
    assert bool(warned) == bool(warning)
    assert all(warning in found for found in warned)
    answers(student)
    assert pad_id(load_tokenizer(student), min(teacher_rows, student_rows)) < min(teacher_rows, student_rows)

    # A row that spells the token out, however far down, is an error: it would be an id without a row, or without sense.
    token = pad or "<image>"
    late = [*ROWS, *({"source": f"un {i}", "target": f"one {i} {i}"} for i in range(300)), {"source": f"x {token}"}]
    late[-1]["target"] = "y"
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in late), encoding="utf-8")
    errors = check(values | {"teacher": str(teacher), "student": str(student)}, tmp_path).errors()
    assert errors
    assert all(f"the token {token!r}" in error.what and "row 341" in error.where for error in errors)
    if min(teacher_rows, student_rows) == student_rows == 320:
        with pytest.raises(SkdError, match="has the token id 320, and the model has 320 rows"):
            generate(load_model(student, device="cpu"), load_tokenizer(student), [token], TaskConfig(), batch_size=1)


def test_a_teachers_tokens_beyond_its_rows_are_found_where_the_student_is_cut(
    values: dict[str, Any], tmp_path: Path, models: tuple[Path, Path], save_tiny_model: SaveTinyModel
) -> None:
    values |= {"student_init": {"mode": "prune", "keep_first": 1, "keep_last": 1}}
    del values["student"]
    with_tokens(models[0], "<late>")
    assert only(check(values, tmp_path), "warning").name == "teacher"
    rows = [*ROWS * 6, {"source": "un <late> mot", "target": "one word"}]
    unique = [{"source": f"{row['source']} {i}", "target": f"{row['target']} {i}"} for i, row in enumerate(rows)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in unique), encoding="utf-8")
    errors = check(values, tmp_path).errors()
    assert ["row 241" in error.where for error in errors] == [True]
    save_tiny_model(models[0], layers=3, vocab_size=310)  # ordinary tokens, which any text may make
    found = only(check(values, tmp_path), "error")
    assert "the teacher's tokenizer has 10 ids that its model has no row for (vocab_size 310): 310" in found.what


def test_a_template_that_prints_a_token_without_a_row(
    values: dict[str, Any], tmp_path: Path, models: tuple[Path, Path]
) -> None:
    for folder in models:
        with_tokens(folder, "<image>")
        tokenizer = load_tokenizer(folder)
        assert isinstance(tokenizer.chat_template, str)
        tokenizer.chat_template = "<image>" + tokenizer.chat_template
        tokenizer.save_pretrained(folder)
    errors = check(values, tmp_path).errors()
    assert {error.what.partition(",")[0] for error in errors} == {
        "its prompt or answer has the token '<image>' (id 320)"
    }


@pytest.mark.parametrize("what", ["pre_tokenizer", "post_processor", "normalizer"])
def test_tokenizers_that_cut_texts_in_different_ways(
    what: str, values: dict[str, Any], models: tuple[Path, Path], tmp_path: Path
) -> None:
    other = {
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "post_processor": None,
        "normalizer": {"type": "Replace", "pattern": {"String": "e"}, "content": "a"},
    }
    edit_json(models[1] / "tokenizer.json", **{what: other[what]})
    found = only(check(values, tmp_path), "warning")
    assert found.name == "tokenizers"
    assert "cut the same text in different ways" in found.what


def test_special_ids_that_are_none(values: dict[str, Any], models: tuple[Path, Path], tmp_path: Path) -> None:
    edit_json(models[0] / "generation_config.json", pad_token_id=-1)
    assert check(values, tmp_path).errors() == []
    edit_json(models[0] / "config.json", eos_token_id=-1)
    errors = check(values, tmp_path).errors()
    assert errors
    assert all(error.what.startswith("eos_token_id of config.json: ") for error in errors)


def test_an_ordinary_token_of_one_tokenizer_is_an_error(
    values: dict[str, Any], tmp_path: Path, save_tiny_model: SaveTinyModel
) -> None:
    teacher, student = pair(tmp_path, save_tiny_model, 384, 384)
    state = json.loads((student / "tokenizer.json").read_text())
    state["model"]["vocab"]["zzz"] = 320
    (student / "tokenizer.json").write_text(json.dumps(state))
    (error,) = check_compatible(teacher, student)
    assert "320 is unused for the teacher, 'zzz' for the student" in error.what
    assert (
        only(check(values | {"teacher": str(teacher), "student": str(student)}, tmp_path), "error").what == error.what
    )


def test_a_student_takes_over_where_its_teacher_ends(
    values: dict[str, Any],
    tmp_path: Path,
    models: tuple[Path, Path],
    tiny_tokenizer: PreTrainedTokenizerFast,
    caplog: pytest.LogCaptureFixture,
) -> None:
    teacher, student = models
    GenerationConfig(eos_token_id=[2, 3]).save_pretrained(teacher)
    found = only(check(values, tmp_path), "warning")
    assert found.name == "tokenizers"
    assert "end-of-sequence ids: [2, 3] for the teacher, [2] for the student" in found.what
    with caplog.at_level("WARNING"):
        assert check_compatible(teacher, student) == []
    assert "different end-of-sequence ids" in caplog.text
    model = load_model(student, device="cpu")
    take_over_ends(model, tiny_tokenizer, teacher)
    assert eos_ids(model, tiny_tokenizer) == (2, 3)
    save_model(model, tiny_tokenizer, tmp_path / "saved")
    assert eos_ids(tmp_path / "saved", tiny_tokenizer) == (2, 3)
    assert compare(teacher, tmp_path / "saved").warnings == []
