"""YAML and JSON are read strictly: one meaning, or an error that names the line."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from skd_lib._core import documents
from skd_lib._core.documents import parse_json, parse_yaml, parse_yaml_documents, read_text
from skd_lib.errors import SkdError

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1", 1),
        ("-7", -7),
        ("1e-5", 1e-5),
        ("1.5e3", 1500.0),
        (".5", 0.5),
        ("-0.0", 0.0),
        ("true", True),
        ("~", None),
        ("", None),
        ("y", "y"),
        ("1.2.3", "1.2.3"),
        ("v010", "v010"),
        ("'no'", "no"),
        ('"010"', "010"),
        ("!!str 2026-11-29", "2026-11-29"),
        ("|\n  1:30\n", "1:30\n"),
        ("a: &x {b: 1, c: 2}\nd: {<<: *x, c: 3}\n", {"a": {"b": 1, "c": 2}, "d": {"b": 1, "c": 3}}),
        ("a: {<<: [{b: 1}, {b: 2, c: 3}]}", {"a": {"b": 1, "c": 3}}),
        ("[a, [b, {c: d}]]", ["a", ["b", {"c": "d"}]]),
    ],
)
def test_plain_values(text: str, value: Any):
    read = parse_yaml(text, where="f")
    assert read == value
    assert str(read) == str(value)  # -0.0 == 0.0, True == 1


NUMBERS = [
    "010",
    "08",
    "-017",
    "1:30",
    "190:20:30",
    "1:30.5",
    "0b10",
    "0b_",
    "0x_",
    "0x1F",
    "0o17",
    "1_000",
    "1_0.5",
    "00.5",
]
BOOLEANS = ["no", "No", "NO", "yes", "on", "OFF"]
DATES = ["2026-11-29", "2026-13-45", "2026-11-29 99:99:99"]


@pytest.mark.parametrize("text", [*NUMBERS, *BOOLEANS, *DATES, "="])
def test_what_readers_of_yaml_disagree_on_is_an_error_with_the_line(text: str):
    with pytest.raises(SkdError, match="quote it") as caught:
        parse_yaml(f"a: 1\nb:\n  c: [x, {text}]\n", where="run.yaml")
    assert caught.value.where == "run.yaml, line 3, field `b.c`"
    assert f"`{text}`" in caught.value.what


@pytest.mark.parametrize(
    ("text", "what", "place"),
    [
        ("a: 1\nb: 2\na: 3", "`a` is there twice, first in line 1", "line 3, field `a`"),
        ("a:\n  b:\n    c: 1\n    d: 2\n    c: 1", "`c` is there twice, first in line 3", "line 5, field `a.b.c`"),
        ("- {a: 1, a: 1}", "`a` is there twice", "line 1"),
        ("x: &x {a: 1}\ny: {<<: *x, <<: *x}", "`<<` is there twice", "line 2"),
        ("a: .inf", ".inf is no value here", "line 1, field `a`"),
        ("a: -.INF", "is no value here", "line 1"),
        ("a: .nan", ".nan is no value here", "line 1"),
        ("a: 1e400", "too large", "line 1"),
        ("a: 1e-400", "too small", "line 1"),
        ("a: " + "9" * 5000, "5000 digits", "line 1"),
        ("1: a", "a key must be text: quote `1`", "line 1"),
        ("? [a]\n: b", "a key must be text", "line 1"),
        ("a: !!python/name:os.system x", "the YAML tag tag:yaml.org,2002:python/name:os.system is not", "line 1"),
        ("a: *b", r"the alias \*b has no anchor", "line 1"),
        ("a: &a [*a]", r"the alias \*a has no anchor", "line 1"),
        ("a: {<<: 1}", "`<<` must be followed by a mapping", "line 1"),
        ("a: [1", "not YAML", "line 2"),
        ("a: b: c", "not YAML: mapping values", "line 1"),
        ("a: 1\n---\nb: 1", "more than one YAML document", "f"),
        ("a: \x1b", "not YAML", "f"),
        ("a: \ud800", "not YAML", "f"),
    ],
)
def test_what_is_refused(text: str, what: str, place: str):
    with pytest.raises(SkdError, match=what) as caught:
        parse_yaml(text, where="f")
    assert place in caught.value.where
    assert len(str(caught.value)) < 400


def aliases(kind: str) -> str:
    """Ten lines that stand for ten to the power of ten values."""
    first, many = {"list": ("[x]", "[{}]"), "merge": ("{k: v}", "{{<<: [{}]}}")}[kind]
    lines = [many.format(", ".join([f"*a{number}"] * 10)) for number in range(10)]
    return f"a0: &a0 {first}\n" + "".join(f"a{n}: &a{n} {line}\n" for n, line in enumerate(lines, 1))


@pytest.mark.parametrize(
    ("text", "what"),
    [
        (aliases("list"), "more than 200,000 values"),
        (aliases("merge"), "more than 200,000 values"),
        ("a: " + "[" * 1500 + "]" * 1500, "deeper than 64 levels"),
        ("- " * 100_000 + "x", "deeper than 64 levels"),
        ("{a: " * 2000, "deeper than 64 levels"),
    ],
)
@pytest.mark.parametrize("parser", ["CSafeLoader", "SafeLoader"])
def test_bombs_are_refused_at_once(text: str, what: str, parser: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(documents, "_PARSER", getattr(yaml, parser))
    start = time.monotonic()
    with pytest.raises(SkdError, match=what):
        parse_yaml(text, where="f")
    assert time.monotonic() - start < 5


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ('{"a": {"b": 1, "b": 2}}', "the key 'b' is there twice"),
        ("[NaN]", "NaN is no value here"),
        ("-Infinity", "Infinity is no value here"),
        ("1e400", "too large"),
        ("1e-400", "too small"),
        ("9" * 5000, "5000 digits"),
        ("[" * 100_000, "deeper than 64 levels"),
        ("[" * 100 + "]" * 100, "deeper than 64 levels"),
        ('"\\ud800"', r"the character U\+D800"),
        ('{"a\\ud800": 1}', r"the character U\+D800"),
        (b"\xff", "not JSON"),
        ("{", "not JSON"),
    ],
)
def test_json_is_read_as_strictly(text: str | bytes, what: str):
    with pytest.raises(SkdError, match=what) as caught:
        parse_json(text, where="--config")
    assert caught.value.where == "--config"


def test_results_may_hold_any_number():
    text = '{"loss": NaN, "perplexity": Infinity, "operations": 123456789012345678901, "text": "\\ud800"}'
    read = parse_json(text, where="summary.json", plain=False)
    assert (read["perplexity"], read["operations"], read["text"]) == (float("inf"), 123456789012345678901, "\ud800")
    with pytest.raises(SkdError, match="not JSON"):
        parse_json("9" * 5000, where="summary.json", plain=False)
    with pytest.raises(SkdError, match="the key 'a' is there twice"):
        parse_json('{"a": 1, "a": 2}', where="summary.json", plain=False)


def test_files_that_are_none(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "large").touch()
    os.truncate(tmp_path / "large", documents.MAX_BYTES + 1)
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    for name, what in {
        "pipe": "not a regular file",
        ".": "a folder",
        "large": "too large",
        "latin": "not UTF-8 text: byte 4 is 0xe9",
        "missing": "No such file",
        "x" * 300: "name too long",
    }.items():
        with pytest.raises(SkdError, match=what) as caught:
            read_text(tmp_path / name)
        assert caught.value.where == str(tmp_path / name)


def test_every_yaml_file_of_the_project_means_the_same_to_both_readers():
    files = [
        path for folder in ("pipelines", "skd_lib", "images", "components") for path in ROOT.glob(f"{folder}/**/*.yaml")
    ]
    assert len(files) > 40
    for path in files:
        text = path.read_text(encoding="utf-8")
        assert parse_yaml_documents(text, where=path.name) == list(yaml.load_all(text, Loader=yaml.CSafeLoader)), path
