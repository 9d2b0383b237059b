"""Data files: what is read, and that what is wrong is named with file, row and field."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from skd_lib.config import Columns, FilesSource
from skd_lib.data import sources
from skd_lib.errors import SkdError, SkdErrors

ROWS = [{"source": f"question {i}", "target": f"réponse {i}\u2028"} for i in range(4)]


def load(path: Path, text: str | bytes, max_rows: int | None = None, **columns: str) -> sources.SourceSplits:
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return sources.load(FilesSource(train=[str(path)], columns=Columns(**columns)), max_rows=max_rows)


def errors_of(path: Path, text: str | bytes) -> list[SkdError]:
    with pytest.raises(SkdErrors) as caught:
        load(path, text)
    return caught.value.errors


def jsonl(*rows: object) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def test_the_same_rows_come_out_of_every_format(tmp_path: Path) -> None:
    csv = "source,target,more\n" + "".join(f'"{row["source"]}","{row["target"]}",x\n' for row in ROWS)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    contents = {
        "a.jsonl": jsonl(*ROWS).encode(),
        "b.ndjson": b"\xef\xbb\xbf" + jsonl(*ROWS).encode() + b"\n",
        "a.csv": csv.encode(),
        "a.tsv": csv.replace(",", "\t").encode(),
        "a.PARQUET": (tmp_path / "a.parquet").read_bytes(),
    }
    for name, content in contents.items():
        train = load(tmp_path / name, content).train
        assert [{"source": e.source, "target": e.target} for e in train] == ROWS, name
        assert len({example.id for example in train}) == len(ROWS)
        assert train[1].origin.startswith(f"{tmp_path / name}, row 2")


def test_a_row_limit_stops_reading_before_a_later_broken_row(tmp_path: Path) -> None:
    assert len(load(tmp_path / "a.jsonl", jsonl(*ROWS) + "{", max_rows=3).train) == 3


def test_columns_can_be_named(tmp_path: Path) -> None:
    content = jsonl({"question": "1 + 1?", "answer": "2"})
    train = load(tmp_path / "a.jsonl", content, source="question", target="answer").train
    assert (train[0].source, train[0].target) == ("1 + 1?", "2")


def test_all_broken_jsonl_rows_are_named_with_row_and_field(tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    good = json.dumps(ROWS[0])
    lines = [
        good,
        '{"source": "a", ',
        '["a", "b"]',
        '{"source": "a"}',
        '{"source": " \\n", "target": 3}',
        '{"source": "a", "target": null}',
    ]
    errors = errors_of(path, "\n".join(lines))
    assert [error.where for error in errors] == [
        f"{path}, row 2",
        f"{path}, row 3",
        f"{path}, row 4, field `target`",
        f"{path}, row 5, field `source`",
        f"{path}, row 5, field `target`",
        f"{path}, row 6, field `target`",
    ]
    assert [error.what for error in errors] == [
        "broken JSON: Expecting property name enclosed in double quotes (column 16)",
        "must be a JSON object, got list ['a', 'b']",
        "the field is missing",
        "the text is empty",
        "must be text, got int 3",
        "must be text, got NoneType None",
    ]
    assert all(error.hint for error in errors)
    assert "this row has: source;" in errors[2].hint


def test_problems_of_several_files_come_together_but_not_endlessly(tmp_path: Path) -> None:
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    one.write_text("{\n", encoding="utf-8")
    two.write_text("{\n" * 100, encoding="utf-8")
    missing = str(tmp_path / "missing.jsonl")
    with pytest.raises(SkdErrors) as caught:
        sources.load(FilesSource(train=[str(one), missing], test=[str(two)]))
    errors = caught.value.errors
    assert [error.where for error in errors[:3]] == [f"{one}, row 1", missing, f"{two}, row 1"]
    assert len(errors) == 21
    assert "stopped after 20" in errors[-1].what


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_a_missing_column_of_a_table_is_one_error(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"a.{ending}"
    if ending == "csv":
        content = b"source,answer\n" + b"a,b\n" * 50
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"source": "a", "answer": "b"}] * 50), path)
        content = path.read_bytes()
    (error,) = errors_of(path, content)
    assert error.where == f"{path}, field `target`"
    assert "source, answer" in error.hint


def test_broken_csv_rows_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    errors = errors_of(path, 'source,target\n"two\nlines",b\na,b,c\na\n,b\n"open')
    assert [error.where for error in errors] == [
        f"{path}, row 2 (line 4)",
        f"{path}, row 3 (line 5)",
        f"{path}, row 4 (line 6), field `source`",
        f"{path}, row 5",
    ]


def test_wrong_values_in_parquet_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    table = pyarrow.Table.from_pylist([{"source": "a", "target": "b"}, {"source": None, "target": "c"}])
    pyarrow.parquet.write_table(table, path)
    (error,) = errors_of(path, path.read_bytes())
    assert error.where == f"{path}, row 2, field `source`"


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("a.parquet", b"not parquet at all", "not a Parquet file"),
        ("a.jsonl", b'{"source": "caf\xe9", "target": "b"}', "not UTF-8"),
        ("a.csv", b"source,target\ncaf\xe9,b\n", "not UTF-8"),
        ("a.txt", b"text", "unknown kind of data file"),
    ],
)
def test_files_of_another_format_are_refused(tmp_path: Path, name: str, content: bytes, what: str) -> None:
    (error,) = errors_of(tmp_path / name, content)
    assert what in error.what
    assert error.where.startswith(str(tmp_path / name))
    assert error.hint


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_an_empty_split_is_an_error(tmp_path: Path, split: str) -> None:
    (tmp_path / "rows.jsonl").write_text(jsonl(*ROWS), encoding="utf-8")
    (tmp_path / "empty.jsonl").write_text("\n", encoding="utf-8")
    files = {"train": [str(tmp_path / "rows.jsonl")], split: [str(tmp_path / "empty.jsonl")]}
    with pytest.raises(SkdError, match=f"the split `{split}` is empty"):
        sources.load(FilesSource(**files))
