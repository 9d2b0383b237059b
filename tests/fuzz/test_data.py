"""Data files: what preflight accepts is prepared, loaded again and tokenised."""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from skd_lib.config import DataConfig, RunConfig, TaskConfig, parse_section
from skd_lib.data.prepared import SPLITS, PreparedData, prepare
from skd_lib.data.tokenize import encode
from skd_lib.preflight.checks import Checks
from skd_lib.preflight.data import check_data
from tests.fuzz.conftest import accepted, bounded, fuzz

WORDS = ("copper", "tulip", "harbour", "violin", "glacier", "pepper", "lantern", "meadow", "rocket", "velvet")
ROWS = [
    {"source": f"{WORDS[i % 10]} {WORDS[i // 2 % 10]} {i * i}", "target": f"{WORDS[(i * 7) % 10]} {i}", "more": i}
    for i in range(30)
]


def _table(rows: list[dict[str, Any]]) -> bytes:
    out = io.BytesIO()
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), out)
    return out.getvalue()


def _separated(rows: list[dict[str, Any]], mark: str) -> bytes:
    out = io.BytesIO()
    pyarrow.csv.write_csv(
        pa.Table.from_pylist(rows), out, pyarrow.csv.WriteOptions(delimiter=mark, quoting_style="none")
    )
    return out.getvalue()


def _lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode("utf-8")


WRITERS: dict[str, Callable[[list[dict[str, Any]]], bytes]] = {
    "rows.jsonl": _lines,
    "rows.jsonl.gz": lambda rows: gzip.compress(_lines(rows), mtime=0),
    "rows.json": lambda rows: json.dumps(rows).encode(),
    "rows.csv": lambda rows: _separated(rows, ","),
    "rows.tsv": lambda rows: _separated(rows, "\t"),
    "rows.parquet": _table,
}
FILES = {name: write(ROWS) for name, write in WRITERS.items()}
BYTES = [
    b"",
    b"\n",
    b"\r\n",
    b'"',
    b",",
    b"\t",
    b"{",
    b"}",
    b"[",
    b"]",
    b"\\",
    b"\x00",
    b"\xff",
    b"\xef\xbb\xbf",
    b"\xe2\x80\xa8",
]
BYTES += [
    b'{"source": 1}\n',
    b"null",
    b"NaN",
    b"1e999",
    b'"\\ud800"',
    b"\x1f\x8b\x08",
    b"PAR1",
    b"9" * 5000,
    b"[" * 3000,
]
VALUES: list[Any] = [
    "",
    " ",
    "\0",
    "\n",
    "a\u2028b",
    "\ud800",
    "<|im_end|>",
    "<s>",
    "x" * 20_000,
    "\x1b[2J",
    "é",
    "1:30",
]
VALUES += [None, True, 0, -1, 10**400, 0.5, 1e308, float("nan"), float("inf"), [], {}, ["a"], {"a": 1}]
COLUMNS: list[dict[str, Any]] = [
    {},
    {"source": "{source} {more}", "cast": {"more": "text"}},
    {"source": "{source}{target}"},
    {"source": "more", "cast": {"more": "text"}},
    {"source": "more"},
    {"target": "absent"},
    {"source": "{source} {"},
    {"target": "more", "cast": {"more": "label_name"}},
]
SETTINGS: list[dict[str, Any]] = [
    {},
    {"near_duplicate_threshold": 1},
    {"test_examples": 1, "validation_examples": 1},
    {"test_fraction": 0.9},
    {"student_examples": 1, "teacher_examples": 100},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


@fuzz(250)
@given(
    name=st.sampled_from(sorted(FILES)),
    edits=st.lists(
        st.tuples(
            st.floats(0, 1), st.sampled_from(["put", "over", "cut", "end", "flip", "twice"]), st.sampled_from(BYTES)
        ),
        min_size=1,
        max_size=3,
    ),
    columns=st.sampled_from(COLUMNS[:2]),
)
def test_bytes(
    folder: Path,
    tiny_tokenizer: PreTrainedTokenizerFast,
    name: str,
    edits: list[tuple[float, str, bytes]],
    columns: dict[str, Any],
) -> None:
    content = FILES[name]
    for place, how, snippet in edits:
        at = int(place * len(content))
        match how:
            case "put":
                content = content[:at] + snippet + content[at:]
            case "over":
                content = content[:at] + snippet + content[at + len(snippet) :]
            case "cut":
                content = content[:at] + content[at + 1 + len(snippet) :]
            case "end":
                content = content[:at]
            case "flip":
                content = content[:at] + bytes(255 - byte for byte in content[at : at + 1]) + content[at + 1 :]
            case "twice":
                content = content[:at] + content[max(0, at - 40) :]
    check(folder, tiny_tokenizer, name, content, columns, {})


@fuzz(250)
@given(
    name=st.sampled_from(sorted(FILES)),
    changes=st.lists(
        st.tuples(
            st.integers(0, len(ROWS) - 1),
            st.sampled_from(["source", "target", "more", "absent", "", "so\nurce"]),
            st.one_of(st.sampled_from(VALUES), st.text(max_size=6)),
            st.sampled_from(["set", "drop", "all", "rename", "fewer"]),
        ),
        max_size=3,
    ),
    columns=st.sampled_from(COLUMNS),
    settings=st.sampled_from(SETTINGS),
)
def test_values(
    folder: Path,
    tiny_tokenizer: PreTrainedTokenizerFast,
    name: str,
    changes: list[tuple[int, str, Any, str]],
    columns: dict[str, Any],
    settings: dict[str, Any],
) -> None:
    rows: list[dict[str, Any]] = [dict(row) for row in ROWS]
    for number, field, value, how in changes:
        match how:
            case "set":
                rows[number % len(rows)][field] = value
            case "drop":
                rows[number % len(rows)].pop(field, None)
            case "all":
                rows = [{**row, field: value} for row in rows]
            case "rename":
                rows = [{("name" if key == field else key): each for key, each in row.items()} for row in rows]
            case "fewer":
                rows = rows[: max(1, number)]
    try:
        content = WRITERS[name](rows)
    except (pa.ArrowException, UnicodeEncodeError, OverflowError):
        return  # no such file can be written
    check(folder, tiny_tokenizer, name, content, columns, settings)


def check(
    folder: Path,
    tokenizer: PreTrainedTokenizerFast,
    name: str,
    content: bytes,
    columns: dict[str, Any],
    settings: dict[str, Any],
) -> None:
    file = folder / name
    file.write_bytes(content)
    values = {"source": {"type": "files", "train": [str(file)], "columns": columns}, **settings}
    data = accepted(lambda: parse_section(DataConfig, values, where="data"))
    if data is None:
        return
    task = TaskConfig(prompt="translate: {source}", max_prompt_tokens=96, max_new_tokens=64)
    run = RunConfig(name="tiny", teacher="teacher", student="student", data=data, task=task)
    checks = Checks()
    accepted(lambda: check_data(checks, run, [], [run]))
    errors = [check for check in checks.found if check.level == "error"]
    for error in errors:
        assert "this is a bug" not in error.what, error
        assert error.what.strip()
    if errors:
        return
    with bounded():
        made = prepare(data, folder / "prepared", seed=0)
    assert PreparedData.load(folder / "prepared") == made
    for split in SPLITS:
        for example in getattr(made, split):
            encoded = encode(tokenizer, task, example, 2)
            assert encoded.prompt_ids
            assert encoded.response_ids
