"""Data files: what is read, and that what is wrong is named with file, row and field."""

from __future__ import annotations

import gzip
import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from skd_lib.config import Columns, FilesSource
from skd_lib.data import json_rows, sources
from skd_lib.data.readers import read_rows
from skd_lib.errors import SkdError, SkdErrors

ROWS = [{"source": f"question {i}", "target": f"réponse {i}\u2028"} for i in range(4)]


def load(path: Path, text: str | bytes, max_rows: int | None = None, **columns: Any) -> sources.SourceSplits:
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return sources.load(FilesSource(train=[str(path)], columns=Columns(**columns)), max_rows=max_rows)


def errors_of(path: Path, text: str | bytes, **columns: Any) -> list[SkdError]:
    with pytest.raises(SkdErrors) as caught:
        load(path, text, **columns)
    return caught.value.errors


def jsonl(*rows: object) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def test_the_same_rows_come_out_of_every_format(tmp_path: Path) -> None:
    csv = "source,target,more\n" + "".join(f'"{row["source"]}","{row["target"]}",x\n' for row in ROWS)
    tsv = "source\ttarget\tmore\n" + "".join(f"{row['source']}\t{row['target']}\tx\n" for row in ROWS)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    contents = {
        "a.jsonl": jsonl(*ROWS).encode(),
        "b.ndjson": b"\xef\xbb\xbf" + jsonl(*ROWS).encode() + b"\n",
        "a.csv": csv.encode(),
        "a.json": json.dumps(ROWS).encode(),
        "b.json": b"\xef\xbb\xbf" + json.dumps(ROWS, indent=2, ensure_ascii=False).encode(),
        "c.json": jsonl(*ROWS).encode(),
        "a.tsv": tsv.encode(),
        "b.tsv": csv.replace(",", "\t").encode(),
        "a.PARQUET": (tmp_path / "a.parquet").read_bytes(),
    }
    contents |= {
        f"{name}.gz": gzip.compress(content) for name, content in contents.items() if not name.endswith("PARQUET")
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
        "must be a JSON object, got list",
        "the field is missing",
        "the text is empty",
        "must be text, got int 3",
        "must be text, got null",
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


# --- whatever a reader raises -------------------------------------------------------------------------------------


def parquet(path: Path, source: Any, target: Any) -> bytes:
    pyarrow.parquet.write_table(pyarrow.table({"source": source, "target": target}), path)
    return path.read_bytes()


def test_a_row_that_its_reader_cannot_take_is_named_and_the_others_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    good = jsonl(ROWS[0])
    rows = ["7" * 4301, "[" * 5000 + "]" * 5000, "1", "[" * 200_000]
    lines = [f'{{"source": "c", "target": "d", "n": {row}}}\n' for row in rows]
    errors = errors_of(path, good + lines[0] + good + lines[1] + lines[2] + lines[3])
    assert [error.where for error in errors] == [f"{path}, row {row}" for row in (2, 4, 6)]
    assert "4300 digits" in errors[0].what
    assert "recursion" in errors[1].what

    path = tmp_path / "a.parquet"
    broken = pyarrow.Array.from_buffers(
        pyarrow.string(), 3, [None, *pyarrow.array([b"a", b"caf\xe9", b"c"], pyarrow.binary()).buffers()[1:]]
    )
    (error,) = errors_of(path, parquet(path, broken, ["x", "y", "z"]))
    assert (error.where, error.what[:14]) == (f"{path}, row 2", "not UTF-8 text")
    late = pyarrow.array([0, 2**50], pyarrow.timestamp("ms"))
    (error,) = errors_of(path, parquet(path, late, ["x", "y"]), cast={"source": "text"})
    assert (error.where, error.what) == (f"{path}, row 2", "broken Parquet: date value out of range")


def test_parquet_with_damaged_pages_is_an_error_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    content = bytearray(parquet(path, [f"question {i}" for i in range(2000)], [str(i) for i in range(2000)]))
    for place in range(40, 1000, 50):
        content[place] ^= 0xFF
    (error,) = errors_of(path, bytes(content))
    assert error.where == f"{path}, row 1"
    assert error.what.startswith("broken Parquet")


@pytest.mark.parametrize(
    ("name", "content", "row", "what"),
    [
        ("cut.jsonl.gz", gzip.compress(jsonl(*ROWS).encode(), mtime=0)[:-4], ", row 5", "ended before"),
        ("plain.jsonl.gz", jsonl(*ROWS).encode(), ", row 1", "Not a gzipped file"),
        ("plain.csv.gz", b"source,target\na,b\n", "", "Not a gzipped file"),
        ("cut.json", json.dumps(ROWS).encode()[:-1], ", row 5", "missing"),
        ("comma.json", json.dumps(ROWS).encode()[:-1] + b",]", ", row 5", "Expecting value"),
        ("two.json", json.dumps(ROWS).encode() * 2, ", row 5", "something follows"),
        ("deep.json", b"[" * 100_000, ", row 1", "recursion"),
        ("latin.json", b'[{"source": "caf\xe9", "target": "b"}]', ", row 1", "not UTF-8"),
        ("latin.csv", b"source,target\na,b\ncaf\xe9,d\n", ", row 2", "not UTF-8"),
        ("a.parquet.gz", b"", "", "unknown kind of data file"),
    ],
)
def test_what_ends_the_reading_is_named(tmp_path: Path, name: str, content: bytes, row: str, what: str) -> None:
    (error,) = errors_of(tmp_path / name, content)
    assert error.where == f"{tmp_path / name}{row}"
    assert what in error.what
    assert error.hint


@pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "tsv", "jsonl.gz", "csv.gz", "tsv.gz", "json.gz"])
def test_a_row_without_an_end_is_not_read_to_its_end(
    tmp_path: Path, ending: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_rows, "MAX_ROW_BYTES", 2**20)
    pack = gzip.compress if ending.endswith("gz") else bytes
    start = {"jsonl": b'{"source": "', "json": b'[{"source": "', "csv": b"source,target\n", "tsv": b"source\ttarget\n"}[
        ending.removesuffix(".gz")
    ]
    (error,) = errors_of(tmp_path / f"a.{ending}", pack(start + b"x" * 2**24))
    assert "more than 1 MiB" in error.what
    monkeypatch.setattr(json_rows, "MAX_EMPTY_LINES", 1000)
    (error,) = errors_of(tmp_path / f"a.{ending}", pack(b"\n" * 2**22))
    assert "empty lines" in error.what or "more than 1 MiB" in error.what


def test_a_text_that_no_model_takes_is_refused_at_once(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    (error,) = errors_of(path, jsonl({"source": "x" * 50_000_000, "target": "b"}, ROWS[0]))
    assert error.where == f"{path}, row 1, field `source`"
    assert "50,000,000 characters is too long" in error.what
    assert len(str(error)) < 400


def test_long_texts_are_read_from_every_format(tmp_path: Path) -> None:
    text = "word " * 30_000  # csv's own limit is 131,072 characters
    for name, content in {
        "a.jsonl": jsonl({"source": text, "target": "b"}),
        "a.csv": f"source,target\n{text},b\n",
        "a.tsv": f"source\ttarget\n{text}\tb\n",
        "a.json": json.dumps([{"source": text, "target": "b"}]),
    }.items():
        assert load(tmp_path / name, content).train[0].source == text, name


def test_names_that_are_there_twice_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    (error,) = errors_of(path, "source,target,target\nq,right,wrong\n")
    assert (error.where, error.what) == (f"{path}, field `target`", "several columns have this name")
    assert len(load(path, "source,target,,\na,b,,\n").train) == 1  # a spreadsheet's empty columns
    path = tmp_path / "a.parquet"
    table = pyarrow.Table.from_arrays([pyarrow.array(["a"])] * 3, names=["source", "target", "source"])
    pyarrow.parquet.write_table(table, path)
    (error,) = errors_of(path, path.read_bytes())
    assert error.where == f"{path}, field `source`"
    for name, content in {
        "a.jsonl": '{"source": "a", "target": "b", "target": "c"}\n',
        "a.json": '[{"source": "a", "target": "b", "target": "c"}]',
    }.items():
        (error,) = errors_of(tmp_path / name, content)
        assert error.where == f"{tmp_path / name}, row 1"
        assert "several fields of one name: target" in error.what
    nested = '{"source": "a", "target": "b", "about": {"x": 1, "x": 2}}\n'
    assert len(load(tmp_path / "a.jsonl", nested).train) == 1


def test_keys_of_a_row_are_shown_not_obeyed(tmp_path: Path) -> None:
    errors = errors_of(tmp_path / "a.jsonl", '{"\\u001b]0;pwned\\u0007": 1, "\\ud800": 2}\n')
    shown = "".join(map(str, errors))
    assert "\x1b" not in shown
    shown.encode()
    many = errors_of(tmp_path / "a.jsonl", jsonl({f"key {i}" * 100: 1 for i in range(1000)}))
    assert all(len(str(error)) < 800 for error in many)


# --- tab-separated files ------------------------------------------------------------------------------------------


def test_quotation_marks_in_a_tab_separated_file_are_text(tmp_path: Path) -> None:
    rows = [('"Hi," he said.', '"Salut", dit-il.'), ("Bye.", "Au revoir."), ('"Yes."', '"Oui."'), ('5" pipe', "tuyau")]
    text = "source\ttarget\n" + "".join(f"{source}\t{target}\n" for source, target in rows)
    assert [(row.source, row.target) for row in load(tmp_path / "a.tsv", text).train] == rows
    swallowing = 'source\ttarget\n"Hi\tSalut\nBye\tAu revoir\nYes"\tOui\nNo\tNon\n'
    assert [row.source for row in load(tmp_path / "b.tsv", swallowing).train] == ['"Hi', "Bye", 'Yes"', "No"]


def test_a_tab_separated_file_that_is_quoted_as_csv_is_read_so_or_refused(tmp_path: Path) -> None:
    quoted = '"source"\t"target"\n"a ""b""\tc"\t"d"\n"e"\t"f\ng"\n'
    assert [(row.source, row.target) for row in load(tmp_path / "a.tsv", quoted).train] == [
        ('a "b"\tc', "d"),
        ("e", "f\ng"),
    ]
    path = tmp_path / "b.tsv"
    (error,) = errors_of(path, 'source\ttarget\n"a ""b"" c"\td\ne\tf\n')
    assert error.where == f"{path}, row 1 (line 2)"
    assert "quoted as in CSV" in error.what
    errors = errors_of(path, 'source\ttarget\n"a\nb"\td\ne\tf\n')
    assert "number of fields" in errors[0].what


# --- columns ------------------------------------------------------------------------------------------------------


def test_parts_of_a_template_may_be_empty_and_what_comes_out_may_not(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    rows = [
        {"instruction": "Name three colours.", "input": "", "output": "red, green, blue"},
        {"instruction": "Sort.", "input": "3 1 2", "output": "1 2 3"},
        {"instruction": " ", "input": "", "output": "?"},
        {"instruction": "Go.", "input": None, "output": "?"},
    ]
    columns: dict[str, Any] = {"source": "{instruction} {input}", "target": "output"}
    train = load(path, jsonl(*rows[:2]), **columns).train
    assert [row.source for row in train] == ["Name three colours.", "Sort. 3 1 2"]
    errors = errors_of(path, jsonl(*rows), **columns)
    assert [(error.where, error.what) for error in errors] == [
        (f"{path}, row 3, field `{{instruction}} {{input}}`", "the text is empty"),
        (f"{path}, row 4, field `input`", "must be text, got null"),
    ]
    assert [row.source for row in load(path, jsonl(rows[3]), cast={"input": "text"}, **columns).train] == ["Go."]


def test_numbers_become_text_where_the_columns_say_so(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    values = [3, -1.5, True, 1e22, 12345678901234567890]
    rows = [{"source": str(i), "target": value} for i, value in enumerate(values)]
    errors = errors_of(path, jsonl(*rows))
    assert errors[0].what == "must be text, got int 3"
    # A problem that the first three rows share is not told of every row.
    assert all("add `cast: {target: text}` to `columns`" in error.hint for error in errors[:3])
    assert [error.what for error in errors[3:]] == ["reading stopped: each of the first 3 rows has the same problem"]
    assert len(errors_of(path, jsonl({"source": "a", "target": "b"}, *rows))) == len(rows)
    train = load(path, jsonl(*rows), cast={"target": "text"}).train
    assert [row.target for row in train] == ["3", "-1.5", "true", "1e+22", "12345678901234567890"]
    wrong = [{"source": "a", "target": value} for value in (float("inf"), None, [1], {"a": 1})]
    assert len(errors_of(path, jsonl(*wrong), cast={"target": "text"})) == 4
    (error,) = errors_of(path, jsonl(rows[0]), cast={"target": "label_name"})
    assert "no label names" in error.what
    decimals = parquet(tmp_path / "b.parquet", ["a"], [Decimal("1.50")])
    assert load(tmp_path / "b.parquet", decimals, cast={"target": "text"}).train[0].target == "1.50"


def test_numbers_of_parquet_are_written_as_people_do(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "a.parquet"
    for targets, texts in (
        (pyarrow.array([0.1, 1e30, 2.0], pyarrow.float32()), ["0.1", "1e+30", "2.0"]),
        (
            pyarrow.array([Decimal(0), Decimal("1E-9"), Decimal(100)], pyarrow.decimal128(38, 9)),
            ["0.000000000", "0.000000001", "100.000000000"],
        ),
    ):
        other = pyarrow.array([[("a", "b")]] * 3, pyarrow.map_(pyarrow.string(), pyarrow.string()))  # not read
        table = pyarrow.table({"source": ["a", "b", "c"], "target": targets, "other": other})
        pyarrow.parquet.write_table(table, path)
        found = sources.load(FilesSource(train=[str(path)], columns=Columns(cast={"target": "text"}))).train
        assert [row.target for row in found] == texts


def test_a_cast_of_a_column_that_is_not_read_is_refused() -> None:
    with pytest.raises(ValueError, match="neither source nor target reads: label"):
        Columns(cast={"label": "text"})


def test_all_fields_of_the_rows_are_read_and_broken_ones_named(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('\ufeff{"prompt": "a", "other": 1}\n\n{"prompt": "b"}\n')
    assert read_rows(path) == [{"prompt": "a", "other": 1}, {"prompt": "b"}]
    path.write_text('{"prompt": "a"}\n{"prompt": \n[]\n')
    with pytest.raises(SkdErrors) as caught:
        read_rows(path)
    assert [error.where for error in caught.value.errors] == [f"{path}, row 2", f"{path}, row 3"]
    with pytest.raises(SkdError, match=r"b\.jsonl: cannot read"):
        read_rows(tmp_path / "b.jsonl")
