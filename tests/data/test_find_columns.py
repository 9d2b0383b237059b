from __future__ import annotations

import json
from pathlib import Path

import pytest

from skd_lib.config import Columns, FilesSource
from skd_lib.data.rows import USUAL_COLUMNS
from skd_lib.data.sources import find_columns


@pytest.mark.parametrize("names", USUAL_COLUMNS)
@pytest.mark.parametrize("ending", ["jsonl", "csv"])
def test_columns_are_found_by_their_usual_names(tmp_path: Path, names: tuple[str, str], ending: str) -> None:
    row = dict.fromkeys(names, "text") | {"id": "7"}
    file = tmp_path / f"train.{ending}"
    lines = [json.dumps(row)] if ending == "jsonl" else [",".join(row), ",".join(row.values())]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert find_columns(FilesSource(train=[str(file)])) == Columns(source=names[0], target=names[1])


def test_columns_that_are_named_or_unusual_are_left(tmp_path: Path) -> None:
    file = tmp_path / "train.jsonl"
    file.write_text('{"question": "a", "answer": "b", "q": "c"}\n', encoding="utf-8")
    named = Columns(source="q", target="answer")
    assert find_columns(FilesSource(train=[str(file)], columns=named)) == named
    file.write_text('{"talk": []}\n', encoding="utf-8")
    for train in (file, tmp_path / "missing.jsonl", tmp_path / "*.csv"):
        assert find_columns(FilesSource(train=[str(train)])) == Columns()
