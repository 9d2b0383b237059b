"""The same against a real tracking server on this machine, also one that is killed and started again."""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient
from typer.testing import CliRunner

from skd_kfp.pipelines.cli import app
from skd_lib.tracking import outbox
from skd_lib.tracking.client import check_tracking, connect
from skd_lib.tracking.locate import children_of
from skd_lib.tracking.models import VERSIONS_TAG, ModelRecord, model_made
from skd_lib.tracking.registry import Champion, champion, register
from skd_lib.tracking.runs import close_pipeline_run, pipeline_record, step_run
from skd_lib.tracking.view import where_to_look

from .conftest import EXPERIMENT
from .postgresql import postgresql
from .server import MlflowServer

TEST_SET = ("test", "c" * 64)
TEACHER = ModelRecord(role="teacher", uri="gs://bucket/teacher", figures={"chrf": 58.6})
STUDENT = ModelRecord(role="student_after", uri="gs://bucket/student", figures={"chrf": 30.5})


def scores_of_models(client: MlflowClient, parent_id: str) -> dict[str, list[float]]:
    """The scores of a pipeline run's logged models, each model's in order of time."""
    experiment_id = client.get_run(parent_id).info.experiment_id
    found = client.search_logged_models([experiment_id], filter_string=f"source_run_id = '{parent_id}'")
    assert len({model.name for model in found}) == len(found)  # none twice
    return {
        model.name: [metric.value for metric in sorted(model.metrics or (), key=lambda metric: metric.timestamp)]
        for model in found
    }


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def running(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, empty_store: Path
) -> Iterator[MlflowServer]:
    folder = tmp_path_factory.mktemp("server")
    with contextlib.ExitStack() as stack:
        database = ""
        if request.param == "postgresql":
            database = stack.enter_context(postgresql())
        else:
            (folder / "mlflow.db").write_bytes(empty_store.read_bytes())
        server = MlflowServer(folder, database)
        stack.callback(server.kill)
        server.start()
        yield server


@pytest.mark.slow
def test_runs_and_registry_over_http(running: MlflowServer, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    server = running.uri
    assert check_tracking(server) is None
    client = connect(server)
    with step_run(step="distill", tracking_uri=server, experiment=EXPERIMENT, params={"lr": 1e-3}) as run:
        run.log_metrics({f"m{i}": 1.0 for i in range(1100)}, step=1)
        run.log_dataset("train", "ab" * 32, "gs://bucket/train.jsonl")
        run.log_text("{}", "summary.json")
        run.log_models([STUDENT.model_copy(update={"figures": {}})])
        parent_id = run.parent.run_id
    with step_run(step="distill", tracking_uri=server, experiment=EXPERIMENT, params={"lr": 1e-3}) as again:
        assert again.run_id == run.run_id
        assert [point.step for point in client.get_metric_history(again.run_id, "m7")] == [1]
    assert len(client.get_run(run.run_id).data.metrics) == 1100

    # A server refuses this machine's paths as a source: the version points at a note in the run instead.
    student = tmp_path / "student"
    student.mkdir()
    for uri, digest in ((str(student), "a" * 64), ("gs://bucket/student", "b" * 64)):
        for _ in range(2):
            register(
                tracking_uri=server,
                model_name="skd-student",
                student_uri=uri,
                weights_sha256=digest,
                run_id=parent_id,
                promote=uri.startswith("gs://"),
                figures={"chrf": 30.0},
                tags={"teacher": "org/teacher"},
            )
    assert "points at a note" in caplog.text
    versions = {found.version: found for found in client.search_model_versions("name = 'skd-student'")}
    assert versions["1"].source == f"runs:/{parent_id}/student"
    assert versions["1"].tags["weights_uri"] == str(student)
    assert versions["2"].source == "gs://bucket/student"
    assert len(versions) == 2
    made = model_made(client, parent_id)
    assert made is not None
    assert json.loads(made.tags[VERSIONS_TAG]) == [{"name": "skd-student", "version": number} for number in "12"]
    assert champion(tracking_uri=server, model_name="skd-student") == Champion("2", "gs://bucket/student", "b" * 64)

    assert close_pipeline_run(tracking_uri=server, experiment=EXPERIMENT, pipeline_run_id="run-1", state="SUCCEEDED")
    assert client.get_run(parent_id).info.status == "FINISHED"
    record = pipeline_record(tracking_uri=server, experiment=EXPERIMENT, pipeline_run_id="run-1")
    assert record.url.endswith(f"/runs/{parent_id}")
    assert [record.table_url] == list(where_to_look(server, EXPERIMENT).values())


@pytest.mark.slow
def test_nothing_is_lost_or_doubled_when_the_server_is_killed(
    running: MlflowServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("KFP_RUN_ID", "run-outage")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr(outbox, "RETRY_SECONDS", 0.5)
    uri, left = running.uri, tmp_path / "left"
    where = {"tracking_uri": uri, "experiment": EXPERIMENT}
    with step_run(step="distill", params={"lr": 1e-3}, **where) as run:
        for step in range(60):
            if step == 20:
                running.kill()
                run.set_tags({"during": "the outage"})
                run.log_dataset("train", "ab" * 32, "gs://bucket/train.jsonl", rows=7)
                run.log_text("kept", "notes/outage.txt")
                run.log_table({"x": [1, 2]}, "table")
                run.log_models([TEACHER, STUDENT], TEST_SET)
            if step == 40:
                assert len(list(left.iterdir())) == 1
                # Other steps begin and end, and so does the whole run, with no server to tell.
                with step_run(step="evaluate", params={"k": 1}, **where) as other:
                    other.log_metrics({"bleu": 30.0})
                    other.log_models([STUDENT.model_copy(update={"figures": {"chrf": 31.0}})], TEST_SET)
                assert not close_pipeline_run(pipeline_run_id="run-outage", state="SUCCEEDED", **where)
                running.start()
                time.sleep(outbox.RETRY_SECONDS)
            run.log_metrics({"loss": float(step)}, step=step)
        run_id, parent_id = run.run_id, run.parent.run_id
    client = connect(uri)
    history = client.get_metric_history(run_id, "loss")
    assert [(point.step, point.value) for point in history] == [(step, float(step)) for step in range(60)]
    assert [point.timestamp for point in history] == sorted(point.timestamp for point in history)
    found = client.get_run(run_id)
    assert found.info.status == "FINISHED"
    assert found.data.tags["during"] == "the outage"
    assert found.inputs is not None
    assert [used.dataset.name for used in found.inputs.dataset_inputs] == ["train"]
    assert {file.path for file in client.list_artifacts(run_id)} >= {"notes"}
    assert scores_of_models(client, parent_id) == {"teacher": [58.6], "student_after": [30.5]}
    assert Path(client.download_artifacts(run_id, "notes/outage.txt", str(tmp_path))).read_text() == "kept"

    # What the other two left is sent by hand, in the order in which they began, however it is named.
    files = {json.loads(path.read_text().splitlines()[0])["step"]: str(path) for path in left.iterdir()}
    assert set(files) == {"evaluate", "finish"}
    told = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    for file in files.values():
        assert sum(f"`skd track replay {file}`" in message for message in told) == 1
    result = CliRunner().invoke(app, ["track", "replay", files["finish"], files["evaluate"]])
    assert result.exit_code == 0, result.output
    assert "1 entries sent" in result.output
    assert not list(left.iterdir())
    parent = client.get_run(parent_id)
    assert parent.info.status == "FINISHED"
    assert parent.data.tags["skd.final_state"] == "SUCCEEDED"
    children = {child.info.run_name: child for child in children_of(client, parent)}
    assert {name: child.info.status for name, child in children.items()} == dict.fromkeys(
        ("distill", "evaluate"), "FINISHED"
    )
    assert children["evaluate"].data.metrics == {"bleu": 30.0, "chrf": 31.0}  # the second of the model
    assert children["evaluate"].data.params == {"skd/k": "1"}
    assert scores_of_models(client, parent_id) == {"teacher": [58.6], "student_after": [30.5, 31.0]}
    assert parent.inputs is not None
    assert parent.outputs is not None
    assert (len(parent.inputs.model_inputs), len(parent.outputs.model_outputs)) == (1, 1)
