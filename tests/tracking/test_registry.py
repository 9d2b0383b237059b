"""The registry in a real MLflow store: one version for each set of weights, aliases, the champion."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mlflow
import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE

from skd_lib._core import events
from skd_lib.errors import SkdError
from skd_lib.tracking import entries, registry
from skd_lib.tracking.registry import Champion, champion, register
from skd_lib.tracking.runs import step_run

from .conftest import EXPERIMENT

MODEL = "it's a student"  # a quote in the name must not break a search


def _register(store: str, digest: str = "a" * 64, **changes: Any) -> str:
    arguments: dict[str, Any] = {
        "tracking_uri": store,
        "model_name": MODEL,
        "student_uri": "gs://bucket/student",
        "weights_sha256": digest,
        "run_id": "",
        "promote": False,
        "figures": {"chrf": 30.5, "speedup": 1.25},
        "tags": {"teacher": "org/teacher", "base_student": "", "data_fingerprint": "f" * 64, "pipeline_run_id": "r"},
    }
    return register(**{**arguments, **changes})


def test_a_version_with_its_lineage(store: str, client: MlflowClient) -> None:
    with step_run(step="register_model", tracking_uri=store, experiment=EXPERIMENT) as run:
        version = _register(store, run_id=run.parent.run_id, description="Student of org/teacher.")
    found = client.get_model_version(MODEL, version)
    assert found.source == "gs://bucket/student"
    assert found.run_id == run.parent.run_id
    assert found.description == "Student of org/teacher."
    assert found.tags == {
        "teacher": "org/teacher",
        "data_fingerprint": "f" * 64,
        "pipeline_run_id": "r",
        "registered_by": "run-1",
        "figure.chrf": "30.5",
        "figure.speedup": "1.25",
        "weights_sha256": "a" * 64,
        "weights_uri": "gs://bucket/student",
    }


def test_the_same_weights_are_registered_once(store: str, client: MlflowClient) -> None:
    assert _register(store) == _register(store, figures={"chrf": 31.0}, tags={"teacher": "other"}) == "1"
    found = client.get_model_version(MODEL, "1")
    assert (found.tags["figure.chrf"], found.tags["teacher"]) == ("31.0", "other")
    assert _register(store, "b" * 64) == "2"


def test_aliases(store: str, client: MlflowClient) -> None:
    assert champion(tracking_uri=store, model_name=MODEL) is None  # no such model
    _register(store)
    assert champion(tracking_uri=store, model_name=MODEL) is None  # no such alias
    _register(store, promote=True)
    _register(store, "b" * 64, figures={"chrf": 20.0})
    assert client.get_registered_model(MODEL).aliases == {"challenger": 2, "champion": 1}
    assert champion(tracking_uri=store, model_name=MODEL) == Champion("1", "gs://bucket/student", "a" * 64)


def test_processes_that_register_the_same_weights_at_once(store: str, client: MlflowClient) -> None:
    with ThreadPoolExecutor(4) as pool:
        versions = set(pool.map(lambda _: _register(store, promote=True), range(4)))
    assert len(versions) == 1
    assert [str(found.version) for found in client.search_model_versions(f'name = "{MODEL}"')] == list(versions)


def test_the_registered_folder_can_be_fetched_by_alias(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = tmp_path / "the student"
    student.mkdir()
    (student / "config.json").write_text("{}", encoding="utf-8")
    _register(store, student_uri=str(student), promote=True, model_name="skd-student")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    (tmp_path / "copy").mkdir()
    fetched = mlflow.artifacts.download_artifacts("models:/skd-student@champion", dst_path=str(tmp_path / "copy"))
    assert (Path(fetched) / "config.json").is_file()


def test_a_registry_that_does_not_answer_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(SkdError, match="registry refused or did not answer"):
        champion(tracking_uri="http://127.0.0.1:9", model_name=MODEL)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that sleeping moves on."""
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
    return now


def _away(monkeypatch: pytest.MonkeyPatch, until: float, clock: list[float], error: Exception) -> list[float]:
    """Until then the store raises `error`; returns when it was asked."""
    asked: list[float] = []
    connect = registry.connect

    def ask(uri: str) -> MlflowClient:
        asked.append(clock[0])
        if clock[0] < until:
            raise error
        return connect(uri)

    monkeypatch.setattr(registry, "connect", ask)
    return asked


def test_a_step_waits_for_a_registry_that_is_down_and_says_so(
    store: str, clock: list[float], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(events.ENV, "1")
    asked = _away(monkeypatch, 100.0, clock, ConnectionError("refused"))
    assert champion(tracking_uri=store, model_name=MODEL, patience=300) is None
    assert len(asked) < 20
    told = [event for line in capsys.readouterr().out.splitlines() if (event := events.parse(line))]
    assert {event["what"] for event in told} == {"waiting for MLflow"}
    assert [event["done"] for event in told] == sorted(event["done"] for event in told)


def test_it_waits_no_longer_than_it_may(store: str, clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(registry.WAIT_VARIABLE, "60")
    _away(monkeypatch, 1e9, clock, ConnectionError("refused"))
    with pytest.raises(SkdError, match=r"did not answer for 6[0-9] seconds: refused"):
        champion(tracking_uri=store, model_name=MODEL, patience=registry.step_patience())
    assert 60 <= clock[0] < 70


def test_a_refusal_is_not_waited_for(store: str, clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    _away(monkeypatch, 1e9, clock, MlflowException("no such thing", error_code=INVALID_PARAMETER_VALUE))
    with pytest.raises(SkdError, match="no such thing"):
        champion(tracking_uri=store, model_name=MODEL, patience=300)
    assert clock[0] < 5


def test_a_version_names_its_run_though_the_store_was_silent_when_the_step_began(
    store: str, client: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    connect, calls = entries.connect, [0]

    def late(uri: str) -> MlflowClient:
        calls[0] += 1
        if calls[0] < 3:
            raise ConnectionError("refused")
        return connect(uri)

    monkeypatch.setattr(entries, "connect", late)
    with step_run(step="register_model", tracking_uri=store, experiment=EXPERIMENT) as run:
        assert run.parent.run_id == ""
        version = _register(store, run_id=run.parent.find)
    assert client.get_model_version(MODEL, version).run_id == run.parent.run_id != ""
