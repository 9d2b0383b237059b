"""Held-out test sets: prepared with the data, kept out of training, and never in the way of the run when broken."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from skd_lib.config import Columns, DataConfig, HeldOutConfig
from skd_lib.data.prepared import PreparedData, data_fingerprint, prepare
from skd_lib.data.rows import Problems, check_rows
from skd_lib.data.sources import load_held_out
from skd_lib.errors import SkdError, SkdErrors

Row = dict[str, Any]


def rows(count: int, name: str) -> list[Row]:
    return [
        {"source": f"{name} {i}: how many is {i} times {i * i}?", "target": f"{name} {i * i * i}"} for i in range(count)
    ]


def write(path: Path, values: list[Row]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in values), encoding="utf-8")
    return path


def held_out(path: Path, **fields: Any) -> Row:
    return {"name": path.stem, "source": {"type": "files", "files": [str(path)]}, **fields}


def config(train: Path, *sets: Row, **values: Any) -> DataConfig:
    source = {"type": "files", "train": [str(train)]}
    return DataConfig.model_validate(
        {"source": source, "held_out": list(sets), "near_duplicate_threshold": 1, **values}
    )


@pytest.fixture
def train(tmp_path: Path) -> Path:
    return write(tmp_path / "train.jsonl", rows(60, "train"))


def test_sets_are_prepared_with_the_data_and_loaded_again(train: Path, tmp_path: Path) -> None:
    svamp = held_out(write(tmp_path / "svamp.jsonl", rows(9, "svamp")), examples=5)
    asdiv = held_out(write(tmp_path / "asdiv.jsonl", rows(4, "asdiv")))
    made = prepare(config(train, svamp, asdiv), tmp_path / "data", seed=1)
    assert PreparedData.load(tmp_path / "data") == made
    assert {name: len(examples) for name, examples in made.held_out.items()} == {"svamp": 5, "asdiv": 4}
    assert made.manifest["rows"]["held_out/svamp"] == 5
    assert len(made.manifest["sha256"]["held_out/asdiv.jsonl"]) == 64
    assert made.missing == made.manifest["missing"] == {}


def test_rows_of_a_held_out_set_leave_training_and_validation(train: Path, tmp_path: Path) -> None:
    leaked = rows(60, "train")[:20]
    path = write(tmp_path / "leaky.jsonl", [*rows(5, "leaky"), *leaked, leaked[0]])
    made = prepare(config(train, held_out(path)), tmp_path / "data", seed=1)
    held = {example.id for example in made.held_out["leaky"]}
    for split in (made.train_teacher, made.train_student, made.validation):
        assert not held & {example.id for example in split}
    dropped = made.manifest["dropped"]
    assert dropped["held-out leaky: repeated"] == 1
    in_test = len(held & {example.id for example in made.test})
    assert (
        dropped["train: also in held-out leaky"] + dropped.get("validation: also in held-out leaky", 0) + in_test == 20
    )
    with pytest.raises(SkdError, match="no row is left in the split `train`"):
        prepare(config(train, held_out(train)), tmp_path / "none", seed=1)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "No such file"),
        ("", "the set is empty"),
        ('{"source": "a"}\n', "row 1, field `target`: the field is missing"),
        ('{"source": "a", "target": ""}\n', "row 1, field `target`: the text is empty"),
        ('{"source": "\\ud800", "target": "b"}\n', "half a surrogate pair"),
        ("{\n", "broken JSON"),
    ],
)
def test_a_broken_set_is_missing_and_everything_else_goes_on(
    train: Path, tmp_path: Path, content: str | None, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    path, good = tmp_path / "broken.jsonl", write(tmp_path / "good.jsonl", rows(3, "good"))
    if content is not None:
        path.write_text(content, encoding="utf-8")
    settings = config(train, held_out(path), held_out(good))
    made = prepare(settings, tmp_path / "data", seed=1)
    assert made.held_out.keys() == {"good"}
    assert reason in made.missing["broken"]
    assert "everything else goes on" in caplog.text
    assert PreparedData.load(tmp_path / "data") == made
    # Once the file is corrected it is other data, so a step whose inputs these are runs again.
    before = data_fingerprint(settings)
    write(path, rows(3, "corrected"))
    assert data_fingerprint(settings) != before


def test_a_set_that_was_lost_or_changed_is_missing(train: Path, tmp_path: Path) -> None:
    sets = [held_out(write(tmp_path / f"{name}.jsonl", rows(3, name))) for name in ("lost", "changed", "kept")]
    prepare(config(train, *sets), tmp_path / "data", seed=1)
    (tmp_path / "data/held_out/lost.jsonl").unlink()
    with (tmp_path / "data/held_out/changed.jsonl").open("a") as file:
        file.write("\n")
    data = PreparedData.load(tmp_path / "data")
    assert data.held_out.keys() == {"kept"}
    assert "No such file" in data.missing["lost"]
    assert "changed since it was prepared" in data.missing["changed"]


def test_the_fingerprint_follows_the_rows_and_not_the_task(train: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", rows(3, "a"))
    prints = {
        data_fingerprint(config(train)),
        data_fingerprint(config(train, held_out(path))),
        data_fingerprint(config(train, held_out(path), held_out(path) | {"name": "b"})),
        data_fingerprint(config(train, held_out(path, examples=2))),
    }
    assert len(prints) == 4
    assert data_fingerprint(config(train, held_out(path, task={"prompt": "Q: {source}"}))) in prints
    moved = write(tmp_path / "elsewhere.jsonl", rows(3, "a"))
    assert data_fingerprint(config(train, held_out(moved) | {"name": "a"})) in prints


def test_one_split_of_a_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    folder = tmp_path / "dataset"
    folder.mkdir()
    write(
        folder / "test.jsonl",
        [{"body": f"There are {i} owls.", "question": "How many?", "answer": f"{i} (owls)"} for i in range(4)],
    )
    source = {
        "type": "hub",
        "dataset": str(folder),
        "columns": {"source": "{body} {question}", "target": "answer"},
    }
    data = config(tmp_path / "train.jsonl")
    examples = load_held_out(HeldOutConfig.model_validate({"name": "owls", "source": source}), data, max_rows=3)
    assert [example.source for example in examples] == [f"There are {i} owls. How many?" for i in range(3)]
    assert examples[2].target == "2 (owls)"
    wrong = {**source, "columns": {"source": "{body} {query}", "target": "answer"}}
    with pytest.raises(SkdErrors) as caught:
        load_held_out(HeldOutConfig.model_validate({"name": "owls", "source": wrong}), data)
    assert "field `query`" in caught.value.errors[0].where


def test_a_template_is_filled_once() -> None:
    columns = Columns(source="{a} and {b}", target="a")
    (example,) = check_rows([("row 1", {"a": "{b}", "b": "x"})], columns, Problems())
    assert (example.source, example.target) == ("{b} and x", "{b}")
