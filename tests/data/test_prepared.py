"""The prepared folder: written whole, described by its manifest, refused when it changed; and the fingerprints."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from skd_lib.config import DataConfig
from skd_lib.data.examples import make_example, read_jsonl, write_jsonl
from skd_lib.data.prepared import SPLITS, PreparedData, data_fingerprint, prepare
from skd_lib.errors import SkdError
from skd_lib.storage import sha256


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    rows = [{"source": f"wie viel ist {i} mal {i * i}?", "target": f"{i * i * i}\u2028"} for i in range(60)]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def config(path: Path, **values: Any) -> DataConfig:
    values = {"near_duplicate_threshold": 1, **values}
    return DataConfig.model_validate({"source": {"type": "files", "train": [str(path)]}, **values})


def test_what_is_prepared_is_loaded_again(source: Path, tmp_path: Path) -> None:
    made = prepare(config(source, student_examples=10), tmp_path / "data", seed=1)
    assert PreparedData.load(tmp_path / "data") == made
    assert made.manifest["rows"] == {"train_teacher": 48, "train_student": 10, "validation": 6, "test": 6}
    for split in SPLITS:
        file = tmp_path / "data" / f"{split}.jsonl"
        assert made.manifest["sha256"][file.name] == sha256(file)
    assert made.test[0].origin.startswith(f"{source}, row ")


def test_preparing_again_gives_the_same_bytes_and_replaces_what_was_there(source: Path, tmp_path: Path) -> None:
    first = prepare(config(source), tmp_path / "data", seed=1)
    (tmp_path / "data" / "left-over").touch()
    assert prepare(config(source), tmp_path / "data", seed=1) == first
    assert not (tmp_path / "data" / "left-over").exists()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_nothing_is_left_of_a_preparation_that_fails(source: Path, tmp_path: Path) -> None:
    with source.open("a", encoding="utf-8") as file:
        file.write("{\n")
    with pytest.raises(SkdError):
        prepare(config(source), tmp_path / "data", seed=1)
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_a_changed_missing_or_broken_file_is_refused(source: Path, tmp_path: Path) -> None:
    prepare(config(source), tmp_path / "good", seed=1)

    def spoiled(name: str) -> Path:
        folder = tmp_path / name
        shutil.copytree(tmp_path / "good", folder)
        return folder

    changed, missing, broken, other = (spoiled(name) for name in ("changed", "missing", "broken", "other"))
    write_jsonl(changed / "test.jsonl", [make_example("a", "b")])
    (missing / "test.jsonl").unlink()
    (broken / "test.jsonl").write_text('{"id": "1"}\n', encoding="utf-8")
    (other / "manifest.json").write_text("[]", encoding="utf-8")
    for folder, what in (
        (changed, "changed since it was prepared"),
        (missing, "No such file"),
        (broken, "not a prepared example"),
        (other, "not a manifest"),
    ):
        with pytest.raises(SkdError, match=what):
            PreparedData.load(folder)


def test_every_unicode_text_survives_the_file(tmp_path: Path) -> None:
    examples = [make_example("line\nbreaks\r\x85\u2028\u2029", '"quotes" \\ \x00 \t \U0001f600', "somewhere")]
    write_jsonl(tmp_path / "a.jsonl", examples)
    assert read_jsonl(tmp_path / "a.jsonl") == examples


def test_the_sources_fingerprint_follows_content_and_preparation_not_location(source: Path, tmp_path: Path) -> None:
    fingerprint = data_fingerprint(config(source))
    copy = tmp_path / "elsewhere.jsonl"
    shutil.copyfile(source, copy)
    assert data_fingerprint(config(copy)) == fingerprint
    assert data_fingerprint(config(copy, student_examples=3)) != fingerprint
    assert data_fingerprint(config(copy, source={"type": "files", "train": [str(copy)], "test": [str(copy)]})) != (
        fingerprint
    )
    with copy.open("a", encoding="utf-8") as file:
        file.write(" ")
    assert data_fingerprint(config(copy)) != fingerprint


def test_the_datas_fingerprint_follows_the_seed(source: Path, tmp_path: Path) -> None:
    prints = {prepare(config(source), tmp_path / f"data{seed}", seed=seed).fingerprint for seed in (1, 2)}
    assert len(prints) == 2


def test_fewer_rows_than_asked_for_are_warned_about(
    source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    prepare(config(source, teacher_examples=7000), tmp_path / "data", seed=1)
    assert "train_teacher: 7000 examples were asked for, the source has 48" in caplog.text


def test_the_manifest_says_what_each_split_lost(source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source.write_text(source.read_text(encoding="utf-8") * 2, encoding="utf-8")
    made = prepare(config(source), tmp_path / "data", seed=1)
    assert made.manifest["losses"]["train"] == {"rows": 108, "lost": {"repeated": 60}}
    assert made.manifest["losses"]["test"] == {"rows": 6, "lost": {}}
    assert "split `train`: 60 of 108 rows (56%) are left out: 60 repeated" in caplog.text
