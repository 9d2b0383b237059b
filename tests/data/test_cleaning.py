"""Logs of a served model as training data: answers that are ignored, and personal data that is taken out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from skd_lib.config import Columns, DataConfig, FilesSource, parse_section
from skd_lib.data import sources
from skd_lib.data.prepared import PreparedData, data_fingerprint, prepare
from skd_lib.data.splits import divide
from skd_lib.errors import SkdError, SkdErrors
from skd_lib.specdec.prompts import read_prompts

EMAIL = {"pattern": r"[\w.+-]+@[\w-]+\.[\w.]+", "replacement": r"<mail \1>"}
PHONE = {"pattern": r"\+?\d[\d ()/-]{7,}\d", "replacement": "<phone>"}
SYSTEM = {"role": "system", "content": "Be brief."}


def said(*texts: str) -> list[dict[str, Any]]:
    return [{"role": ("user", "assistant")[at % 2], "content": text} for at, text in enumerate(texts)]


def config(path: Path, rows: list[Any], columns: dict[str, Any] | None = None, **fields: Any) -> DataConfig:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    source = {"type": "files", "train": [str(path)], "columns": columns or {}}
    return DataConfig.model_validate({"source": source, **fields})


def test_requests_of_a_log_are_prompts_whatever_was_answered(tmp_path: Path) -> None:
    rows = [
        {"messages": [SYSTEM, *said("1 + 1?", "2", "And 2 + 2?", "4")]},
        {"messages": said("One?", "Two", "Three?")},  # refused and unanswered
        {"messages": said("Alone?")},
    ]
    data = config(tmp_path / "log.jsonl", rows, {"answers": "ignore"})
    found = [example.conversation for example in sources.load_data(data).train]
    assert [talk.messages[-1]["content"] for talk in found if talk] == ["And 2 + 2?", "Three?", "Alone?"]
    assert [len(talk.turns()) for talk in found if talk] == [1, 1, 1]
    assert isinstance(data.source, FilesSource)
    columns = sources.find_columns(data.source)
    assert parse_section(Columns, columns.model_dump(), where="") == columns  # as steps hand them on
    assert found[0] is not None
    assert [message["role"] for message in found[0].messages] == ["system", "user", "assistant", "user"]
    with pytest.raises(SkdErrors, match="the last message is the user's"):
        sources.load_data(config(tmp_path / "log.jsonl", rows))
    with pytest.raises(SkdErrors, match="there is no user's message"):
        sources.load_data(config(tmp_path / "log.jsonl", [{"messages": [SYSTEM]}], {"answers": "ignore"}))


def test_prompts_of_a_log_are_its_requests_answered_or_not(tmp_path: Path) -> None:
    rows = [{"messages": said("1 + 1?")}, {"messages": said("2 + 2?", "4")}, {"messages": said("3?", "3", "4?")}]
    config(tmp_path / "log.jsonl", rows)
    found = read_prompts(tmp_path / "log.jsonl", column="source", limit=9)
    assert [talk.messages[-1]["content"] for talk in found if not isinstance(talk, str)] == ["1 + 1?", "2 + 2?", "4?"]


@pytest.mark.parametrize("columns", [{}, {"source": "q", "target": "a"}])
def test_answers_of_texts_are_ignored_likewise(tmp_path: Path, columns: dict[str, str]) -> None:
    names = columns or {"source": "question", "target": "answer"}
    rows = [{names["source"]: "1 + 1?", names["target"]: None}]
    (example,) = sources.load_data(config(tmp_path / "a.jsonl", rows, {**columns, "answers": "ignore"})).train
    assert (example.source, example.target) == ("1 + 1?", "")


def test_patterns_are_replaced_in_every_text_before_anything_is_stored(tmp_path: Path) -> None:
    arguments = {"to": ["a.b@example.org"], "n": 3, "id": "a.b@example.org", "a.b@example.org": 1, "tel": 49301234567}
    call = {"id": "a", "type": "function", "function": {"name": "mail", "arguments": json.dumps(arguments)}}
    tools = [{"type": "function", "function": {"name": "mail", "description": "Mail a.b@example.org"}}]
    asked = said("Write to a.b@example.org")
    rows = [{"messages": [*asked, {"role": "assistant", "content": "a.b@example.org:", "tool_calls": [call]}]}]
    rows[0]["tools"] = tools
    rows += [{"messages": said(f"Question {number} of b@example.org?", "Yes.")} for number in range(20)]
    rows += [{"messages": said("Call +49 30 1234567 or 030/123 45 67!", "I do.")}]
    data = config(tmp_path / "log.jsonl", rows, redact=[EMAIL, PHONE])
    prepare(data, tmp_path / "data", seed=0)
    stored = "".join(path.read_text() for path in (tmp_path / "data").glob("*.jsonl"))
    assert "example.org" not in stored
    assert json.dumps("Write to " + EMAIL["replacement"])[1:-1] in stored  # as it is: no references to groups
    assert '"n": 3' in stored
    assert '"tel": "<phone>"' in stored
    assert "Call <phone> or <phone>!" in stored
    assert "1234567" not in stored
    assert data_fingerprint(data) != data_fingerprint(data.model_copy(update={"redact": []}))


def test_a_pattern_that_would_take_for_ever_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("skd_lib.data.cleaning.PATTERN_SECONDS", 0.1)
    data = config(tmp_path / "log.jsonl", [{"prompt": "a" * 60 + "b"}], redact=[EMAIL, {"pattern": "(a|a|aa)+$"}])
    with pytest.raises(SkdError, match=r"pattern 2 takes more than .* s on a text of 61 characters") as caught:
        sources.load_data(data)
    assert "row 1" in caught.value.where
    assert "aab" not in str(caught.value)


def test_held_out_sets_are_cleaned_too(tmp_path: Path) -> None:
    (tmp_path / "more.jsonl").write_text('{"prompt": "Ask a@example.org"}\n')
    sets = [{"name": "more", "source": {"files": [str(tmp_path / "more.jsonl")], "type": "files"}}]
    data = config(tmp_path / "log.jsonl", [{"prompt": "x"}], redact=[EMAIL], held_out=sets)
    (example,) = sources.load_held_out(data.held_out[0], data)
    assert "@" not in example.source


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed package with a filter."""
    folder = tmp_path / "site"
    (folder / "own_filters-1.0.dist-info").mkdir(parents=True)
    (folder / "own_filters-1.0.dist-info/METADATA").write_text(
        "Metadata-Version: 2.1\nName: own-filters\nVersion: 1.0\n"
    )
    (folder / "own_filters-1.0.dist-info/entry_points.txt").write_text(
        "[skd.filters]\nnames = own_filters:names\nbroken = own_filters:broken\n"
        "length = builtins:len\ngone = own_filters:gone\n"
    )
    (folder / "own_filters.py").write_text(
        "def names(text):\n    return None if 'secret' in text else text.replace('Anna', 'NAME')\n"
        "def broken(text):\n    raise ValueError(text)\n"
    )
    monkeypatch.syspath_prepend(folder)
    return folder


def test_a_filter_that_a_package_registers(tmp_path: Path, package: Path) -> None:
    rows = [{"prompt": "Ask Anna."}, {"prompt": "This is secret."}, {"prompt": "Ask her."}]
    data = config(tmp_path / "log.jsonl", rows, filter="names")
    found = sources.load_data(data)
    assert [example.source for example in found.train] == ["Ask NAME.", "Ask her."]
    assert found.left_out == {"dropped by redact or filter": 1}
    before = data_fingerprint(data)
    metadata = package / "own_filters-1.0.dist-info/METADATA"
    metadata.write_text(metadata.read_text().replace("1.0", "1.1"))
    assert data_fingerprint(data) != before


def test_a_filter_that_is_not_there_or_fails_stops_the_reading(tmp_path: Path, package: Path) -> None:
    rows = [{"prompt": "Ask Anna."}]
    with pytest.raises(SkdError, match="no installed package registers the filter `os:system`") as caught:
        sources.load_data(config(tmp_path / "log.jsonl", rows, filter="os:system"))
    assert "registered here: broken, gone, length, names" in str(caught.value)
    with pytest.raises(SkdError, match="the filter `broken` failed: ValueError") as caught:
        sources.load_data(config(tmp_path / "log.jsonl", rows, filter="broken"))
    assert "row 1" in str(caught.value)
    assert "Anna" not in str(caught.value)
    with pytest.raises(SkdError, match="the filter `gone` cannot be loaded"):
        sources.load_data(config(tmp_path / "log.jsonl", rows, filter="gone"))
    with pytest.raises(SkdError, match="the filter `length` failed: TypeError"):
        sources.load_data(config(tmp_path / "log.jsonl", rows, filter="length"))


def test_where_everything_is_dropped_the_split_is_empty(tmp_path: Path) -> None:
    redact = [{"pattern": ".+", "replacement": ""}]
    with pytest.raises(SkdError, match="the split `train` is empty"):
        sources.load_data(config(tmp_path / "log.jsonl", [{"prompt": "x"}], redact=redact))


def test_private_data_keep_their_fingerprint_and_show_no_pairs(tmp_path: Path) -> None:
    rows = [{"prompt": f"Where is the street number {number % 7}?"} for number in range(30)]
    shown, private = (config(tmp_path / "log.jsonl", rows, private=private) for private in (False, True))
    assert data_fingerprint(shown) == data_fingerprint(private)
    made = prepare(private, tmp_path / "data", seed=0)
    assert PreparedData.load(tmp_path / "data").private
    assert not prepare(shown, tmp_path / "shown", seed=0).private
    pairs = [divide(sources.load_data(data), data, 0).losses["train"].pairs for data in (shown, private)]
    assert [bool(each) for each in pairs] == [True, False]
    assert made.manifest["sha256"] == PreparedData.load(tmp_path / "shown").manifest["sha256"]


def test_a_pattern_must_be_one(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not a regular expression"):
        config(tmp_path / "log.jsonl", [], redact=[{"pattern": "("}])
