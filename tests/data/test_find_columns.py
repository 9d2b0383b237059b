from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

import skd_lib.interface
from skd_lib.config import Columns, FilesSource
from skd_lib.config.data import HeldOutFiles
from skd_lib.data.rows import CONVERSATIONS, INPUT_PARTS, SYSTEM, USUAL_COLUMNS
from skd_lib.data.sources import find_columns, load
from skd_lib.errors import SkdError


@pytest.mark.parametrize("names", USUAL_COLUMNS)
@pytest.mark.parametrize("ending", ["jsonl", "csv"])
def test_columns_are_found_by_their_usual_names(tmp_path: Path, names: tuple[str, str], ending: str) -> None:
    row = dict.fromkeys(names, "text") | {"id": "7"}
    file = tmp_path / f"train.{ending}"
    lines = [json.dumps(row)] if ending == "jsonl" else [",".join(row), ",".join(row.values())]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert find_columns(FilesSource(train=[str(file)])) == Columns(source=names[0], target=names[1])


def test_instructions_come_with_their_input(tmp_path: Path) -> None:
    rows = [
        {"instruction": "Translate into French.", "input": "Good morning", "output": "Bonjour"},
        {"instruction": "Name a river.", "input": "", "output": "The Loire"},
        {"instruction": "Name a river.", "input": None, "output": "The Loire"},
        {"instruction": "Name a river.", "output": "The Loire"},
    ]
    file = tmp_path / "train.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert str(find_columns(FilesSource(train=[str(file)]))) == r"input `{instruction}\n{input}`, answer `output`"
    read = load(FilesSource(train=[str(file)])).train
    assert [(each.source, each.target) for each in read] == [
        ("Translate into French.\nGood morning", "Bonjour"),
        *[("Name a river.", "The Loire")] * 3,
    ]


def test_a_field_that_the_first_row_lacks_is_read_or_told(tmp_path: Path) -> None:
    file = tmp_path / "train.jsonl"
    rows: list[dict[str, str]] = [{"instruction": "Name a river.", "output": "The Loire"}]
    rows.append({"instruction": "Translate.", "input": "Good morning", "output": "Bonjour"})
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    read = load(FilesSource(train=[str(file)])).train
    assert [each.source for each in read] == ["Name a river.", "Translate.\nGood morning"]
    (*_, ours) = skd_lib.interface._examples(rows)
    assert ours.source == "Translate.\nGood morning"
    rows = [{"question": "a", "answer": "b"}, {"question": "a", "answer": "b", "context": "c"}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    with pytest.raises(SkdError, match="several columns: context, question") as found:
        find_columns(HeldOutFiles(type="files", files=[str(file)]))
    assert found.value.where == "data.held_out, source.columns"
    with pytest.raises(SkdError, match="several columns: context, question") as found:
        skd_lib.interface._examples(rows)
    assert found.value.where == "evaluate, dataset"


@pytest.mark.parametrize("more", SYSTEM)
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_a_system_message_beside_a_conversation_is_not_left_out_in_silence(
    tmp_path: Path, name: str, more: str
) -> None:
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    file = tmp_path / "train.jsonl"
    file.write_text(json.dumps({name: talk, more: "Answer in French."}) + "\n", encoding="utf-8")
    with pytest.raises(SkdError, match=f"in a column of its own: {more}") as found:
        load(FilesSource(train=[str(file)]))
    (asked,) = re.findall("`({.*?})`", found.value.hint)
    columns = Columns.model_validate(yaml.safe_load(asked))
    assert len(load(FilesSource(train=[str(file)], columns=columns)).train) == 1


@pytest.mark.parametrize(
    "names", [("question", "answer"), ("instruction", "output"), ("instruction", "input", "output"), ("prompt",)]
)
@pytest.mark.parametrize("more", INPUT_PARTS)
def test_no_part_of_the_input_is_left_out_in_silence(tmp_path: Path, names: tuple[str, ...], more: str) -> None:
    file = tmp_path / "train.jsonl"
    file.write_text(json.dumps(dict.fromkeys((*names, more), "text")) + "\n", encoding="utf-8")
    with pytest.raises(SkdError, match=f"several columns: {more}, {names[0]}") as error:
        load(FilesSource(train=[str(file)]))
    for asked in re.findall("`({.*?})`", error.value.hint):
        columns = Columns.model_validate(yaml.safe_load(asked))
        (read,) = load(FilesSource(train=[str(file)], columns=columns)).train
        assert read.source.split() == ["text"] * (len(columns.names) - (columns.target is not None))


def test_columns_that_are_named_or_unusual_are_left(tmp_path: Path) -> None:
    file = tmp_path / "train.jsonl"
    file.write_text('{"question": "a", "answer": "b", "q": "c"}\n', encoding="utf-8")
    named = Columns(source="q", target="answer")
    assert find_columns(FilesSource(train=[str(file)], columns=named)) == named
    file.write_text('{"talk": []}\n', encoding="utf-8")
    for train in (file, tmp_path / "missing.jsonl", tmp_path / "*.csv"):
        assert find_columns(FilesSource(train=[str(train)])) == Columns()
