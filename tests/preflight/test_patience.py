"""Storage that takes connections and says nothing holds preflight up for half a minute, not for many."""

from __future__ import annotations

from collections.abc import Iterator
from threading import Event
from typing import Any

import pytest

from skd_lib import storage
from skd_lib.config import RunConfig
from skd_lib.errors import SkdError
from skd_lib.preflight import run_checks, storage_access
from skd_lib.preflight.checks import Checks
from skd_lib.preflight.storage_access import bounded, check_answers, check_writable
from skd_lib.storage.fsspec_store import BOTOCORE

RUN: dict[str, Any] = {
    "name": "small",
    "teacher": "/nowhere/teacher",
    "student": "/nowhere/student",
    "data": {"source": {"type": "files", "train": ["/nowhere/train.jsonl"]}},
}


@pytest.fixture
def silent(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Object storage says nothing until the test ends; what it is asked about."""
    asked: list[str] = []
    end = Event()

    def ask(uri: str) -> None:
        asked.append(uri)
        end.wait(20)

    for name in ("exists", "file_sizes", "list_objects", "check_writable"):
        monkeypatch.setattr(storage, name, ask)
    monkeypatch.setattr(storage_access, "PATIENCE", 0.1)
    yield asked
    end.set()


@pytest.mark.parametrize(
    "changes",
    [
        {"teacher": "s3://bucket/teacher"},
        {"data": {"source": {"type": "files", "train": ["s3://bucket/train.jsonl"]}}},
        {},
    ],
)
def test_silent_storage_is_an_error_soon(silent: list[str], changes: dict[str, Any]) -> None:
    config = RunConfig.model_validate(RUN | changes)
    (found,) = run_checks(config, checkpoint_root="" if changes else "s3://bucket/roots", tracking_uri="").checks
    assert (found.name, found.level, [found.where]) == ("storage", "error", silent)
    assert found.what == "the storage has not answered for 0 seconds"
    assert "`skd-storage`" in found.hint


def test_one_look_is_enough_for_each_kind_of_storage(silent: list[str]) -> None:
    checks = Checks()
    assert not check_answers(checks, ["s3://a/b", "/local", "minio://a/b", "s3://a/c", "org/model", ""])
    assert sorted(silent) == ["minio://a/b", "s3://a/b"]
    assert len(checks.found) == 2


def test_any_answer_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(uri: str) -> bool:
        raise SkdError("access denied")

    monkeypatch.setattr(storage, "exists", refuse)
    checks = Checks()
    assert check_answers(checks, ["s3://a/b"])
    assert checks.found == []  # what needs it says so


def test_a_place_that_does_not_take_what_is_written(silent: list[str]) -> None:
    checks = Checks()
    checks.attempt("checkpoints", lambda: check_writable(checks, "checkpoints", "s3://bucket/roots"))
    assert [(found.level, found.where) for found in checks.found] == [("error", "s3://bucket/roots")]


@pytest.mark.parametrize("error", [SkdError("gone"), TimeoutError("of its own"), ValueError("a bug")])
def test_what_a_look_raises_is_raised(error: Exception) -> None:
    def look() -> None:
        raise error

    with pytest.raises(type(error)) as caught:
        bounded(look, "s3://a/b")
    assert caught.value is error


def test_botocore_takes_our_settings_and_repeats_nothing() -> None:
    config = pytest.importorskip("aiobotocore.config").AioConfig(**BOTOCORE)
    assert (config.connect_timeout, config.read_timeout) == (5, 20)
    assert config.retries["total_max_attempts"] == 1
