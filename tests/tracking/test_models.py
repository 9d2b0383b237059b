"""The models of a pipeline run as logged models of MLflow."""

from __future__ import annotations

import logging

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import ENDPOINT_NOT_FOUND

from skd_lib.tracking.entries import ENTRY
from skd_lib.tracking.models import LoggedModels, ModelRecord
from skd_lib.tracking.runs import step_run

from .conftest import EXPERIMENT, Runs

TEST_SET = ("test", "c" * 64)


def records(chrf: float = 51.2) -> list[ModelRecord]:
    return [
        ModelRecord(role="teacher", uri="gs://bucket/teacher", figures={"chrf": 58.6}),
        ModelRecord(role="student_before", figures={"chrf": 31.3, "speedup": 0.9}),
        ModelRecord(role="student_after", uri="gs://bucket/student", params={"method": "skd"}, figures={"chrf": chrf}),
    ]


def log_models(store: str, models: list[ModelRecord]) -> None:
    with step_run(step="report", tracking_uri=store, experiment=EXPERIMENT) as run:
        run.log_dataset("test", TEST_SET[1], "gs://bucket/data", context="test")
        run.log_models(models, TEST_SET)


def test_models_are_linked_with_run_and_data_once(
    store: str, client: MlflowClient, parents: Runs, children: Runs
) -> None:
    for _ in range(2):  # a retry
        log_models(store, records())
    log_models(store, records(52.0))
    (parent,) = (client.get_run(run.info.run_id) for run in parents())
    assert parent.inputs is not None
    assert parent.outputs is not None
    found = {model.name: model for model in client.search_logged_models([parent.info.experiment_id])}
    assert len(client.search_logged_models([parent.info.experiment_id])) == 3
    assert {str(model.status) for model in found.values()} == {"READY"}
    assert {model.source_run_id for model in found.values()} == {parent.info.run_id}
    assert [made.model_id for made in parent.outputs.model_outputs] == [found["student_after"].model_id]
    used = sorted(each.model_id for each in parent.inputs.model_inputs)
    assert used == sorted(found[role].model_id for role in ("teacher", "student_before"))
    assert found["student_after"].tags["model_uri"] == "gs://bucket/student"
    assert found["student_after"].params == {"method": "skd"}
    (step,) = children()
    known = {(metric.key, metric.dataset_name, metric.run_id) for metric in found["student_before"].metrics or ()}
    assert known == {("chrf", "test", step.info.run_id), ("speedup", "test", step.info.run_id)}
    assert [metric.value for metric in found["student_after"].metrics or ()][-1] == 52.0
    assert parent.data.metrics == {}  # there `chrf` would be of no model


def test_another_run_has_models_of_its_own(
    store: str, client: MlflowClient, parents: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    log_models(store, records())
    monkeypatch.setenv("KFP_RUN_ID", "run-2")
    log_models(store, records())
    runs = {model.source_run_id for model in client.search_logged_models([parents()[0].info.experiment_id])}
    assert len(runs) == 2


def test_an_older_server_goes_without(
    store: str, parents: Runs, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def unknown(*_: object, **__: object) -> None:
        raise MlflowException("no such endpoint", error_code=ENDPOINT_NOT_FOUND)

    monkeypatch.setattr(MlflowClient, "search_logged_models", unknown)
    with caplog.at_level(logging.WARNING):
        log_models(store, records())
    assert "refused a request, which is left out: no such endpoint" in caplog.text
    assert parents()[0].info.status == "RUNNING"  # the step ended well


def test_models_can_wait_on_disk() -> None:
    entry = LoggedModels(models=records(), dataset=TEST_SET)
    assert ENTRY.validate_json(entry.model_dump_json()) == entry
