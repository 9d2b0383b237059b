"""Runs in a real MLflow store: made once, found again, closed as they ended, and never in the way of the work."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE

from skd_lib.errors import SkdError
from skd_lib.tracking import locate, outbox
from skd_lib.tracking.client import check_tracking, connect, find_or_create_experiment
from skd_lib.tracking.runs import PipelineRecord, close_pipeline_run, pipeline_record, step_run

from .conftest import EXPERIMENT, Runs


def test_one_parent_with_a_nested_run_for_each_step(store: str, parents: Runs, children: Runs) -> None:
    for step in ("preflight", "distill", "evaluate-student_after"):
        with step_run(step=step, tracking_uri=store, experiment=EXPERIMENT, run_name="demo") as run:
            run.log_metrics({"x": 1.0})
            run.parent.set_tags({step: "seen"})

    (parent,) = parents()
    assert parent.info.run_name == "demo"
    assert parent.info.status == "RUNNING"  # until `finish` closes it
    assert parent.data.tags["kfp.pipeline_run_id"] == "run-1"
    assert {child.data.tags["kfp.task"] for child in children()} == {"preflight", "distill", "evaluate-student_after"}
    for child in children():
        assert child.info.status == "FINISHED"
        assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert parent.data.tags[child.data.tags["kfp.task"]] == "seen"


def test_resumed_step_goes_on_in_its_run(store: str, client: MlflowClient, parents: Runs, children: Runs) -> None:
    def first_attempt() -> None:
        with step_run(step="distill", tracking_uri=store, experiment=EXPERIMENT, params={"lr": 1e-3}) as run:
            for step in range(1, 5):
                run.log_metrics({"loss": float(step)}, step=step)
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        first_attempt()
    (failed,) = children()
    assert failed.info.status == "FAILED"
    assert failed.data.tags["skd.error"] == "RuntimeError: out of memory"

    with step_run(step="distill", tracking_uri=store, experiment=EXPERIMENT, params={"lr": 1e-3}) as run:
        assert [point.step for point in client.get_metric_history(run.run_id, "loss")] == [1, 2, 3, 4]
        assert client.get_run(run.run_id).info.status == "RUNNING"
        for step in range(3, 7):  # from the checkpoint of step 2: steps 3 and 4 come a second time
            run.log_metrics({"loss": float(step)}, step=step)
        run.log_metrics({"best": 0.5})
    (finished,) = children()
    assert finished.info.run_id == failed.info.run_id
    assert finished.info.status == "FINISHED"
    assert "skd.error" not in finished.data.tags
    history = client.get_metric_history(finished.info.run_id, "loss")
    assert [(point.step, point.value) for point in history] == [(step, float(step)) for step in range(1, 7)]
    assert len(parents()) == 1


def test_final_figures_are_replaced_where_they_differ(store: str, client: MlflowClient, children: Runs) -> None:
    for score in (30.0, 31.0, 31.0):
        with step_run(step="evaluate", tracking_uri=store, experiment=EXPERIMENT) as run:
            run.log_metrics({"chrf": score})
            time.sleep(0.002)  # MLflow's clock ticks milliseconds
    (child,) = children()
    assert child.data.metrics["chrf"] == 31.0
    assert [point.value for point in client.get_metric_history(child.info.run_id, "chrf")] == [30.0, 31.0]


def test_changed_param_keeps_the_first_and_does_not_lose_the_others(
    store: str, children: Runs, caplog: pytest.LogCaptureFixture
) -> None:
    with step_run(step="s", tracking_uri=store, experiment=EXPERIMENT, params={"a": {"lr": 0.1}, "b": [1, 2]}):
        pass
    with step_run(step="s", tracking_uri=store, experiment=EXPERIMENT, params={"a": {"lr": 0.2}, "c": None}):
        pass
    (child,) = children()
    assert child.data.params == {"skd/a.lr": "0.1", "skd/b": "[1, 2]", "skd/c": "null"}
    assert child.data.tags["skd.changed.a.lr"] == "0.1 -> 0.2"
    assert "skd/a.lr was 0.1" in caplog.text


def test_limits_of_one_request(store: str, children: Runs) -> None:
    with step_run(step="s", tracking_uri=store, experiment=EXPERIMENT) as run:
        run.log_params({f"p{i}": "x" * 7000 for i in range(120)})
        run.log_metrics({f"m{i}": float(i) for i in range(1200)}, step=1)
        run.set_tags({f"t{i}": "y" * 9000 for i in range(120)})
    (child,) = children()
    assert len(child.data.params) == 120
    assert len(child.data.params["skd/p0"]) == 6000
    assert len(child.data.metrics) == 1200
    assert child.data.tags["t119"].endswith("...")


def test_datasets_and_artifacts(store: str, client: MlflowClient, children: Runs, tmp_path: Path) -> None:
    report = tmp_path / "report.md"
    report.write_text("fine", encoding="utf-8")
    digest = "ab" * 32
    for _ in range(2):  # a retry adds nothing
        with step_run(step="s", tracking_uri=store, experiment=EXPERIMENT) as run:
            run.log_dataset("train_student", digest, "gs://bucket/train.jsonl", rows=7)
            run.log_artifact(report, "reports")
            run.log_text("{}", "summary.json")
            with pytest.raises(FileNotFoundError):
                run.log_artifact(tmp_path / "missing")
    (child,) = children()
    assert child.inputs is not None
    (dataset,) = child.inputs.dataset_inputs
    assert dataset.dataset.name == "train_student"
    assert dataset.dataset.digest == digest[:36]
    assert json.loads(dataset.dataset.profile or "") == {"sha256": digest, "num_rows": 7}
    assert json.loads(dataset.dataset.source) == {"uri": "gs://bucket/train.jsonl"}
    assert [(tag.key, tag.value) for tag in dataset.tags] == [("mlflow.data.context", "train")]
    files = {file.path for file in client.list_artifacts(child.info.run_id)}
    assert files == {"reports", "summary.json"}
    # Artifacts lie beside the database, wherever the process was started.
    assert child.info.artifact_uri.startswith((tmp_path / "runs" / "mlartifacts").as_uri())


def test_kubeflows_own_run_is_adopted(
    store: str, client: MlflowClient, children: Runs, parents: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = find_or_create_experiment(client, store, EXPERIMENT)
    parent = client.create_run(experiment, tags={"kfp.pipeline_run_id": "run-1"})
    # The plugin may tag the nested run with the pipeline run as well; it must not be taken for the parent.
    nested = client.create_run(
        experiment, tags={"kfp.pipeline_run_id": "run-1", "mlflow.parentRunId": parent.info.run_id}
    )
    monkeypatch.setenv("MLFLOW_RUN_ID", nested.info.run_id)
    with step_run(step="distill", tracking_uri=store, experiment=EXPERIMENT) as run:
        assert run.run_id == nested.info.run_id
        assert run.parent.run_id == parent.info.run_id
    monkeypatch.delenv("MLFLOW_RUN_ID")
    with step_run(step="report", tracking_uri=store, experiment=EXPERIMENT) as run:
        assert run.parent.run_id == parent.info.run_id
    assert len(parents()) == 1
    assert len(children()) == 2


def test_unknown_mlflow_run_id_is_not_fatal(
    store: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_RUN_ID", "0" * 32)
    with step_run(step="distill", tracking_uri=store, experiment=EXPERIMENT) as run:
        assert run.run_id not in ("", "0" * 32)
    assert "is no run of this tracking store" in caplog.text


def test_steps_that_start_together_share_the_parent(
    store: str, parents: Runs, children: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locate, "SETTLE_SECONDS", 1.0)

    def one(number: int) -> None:
        with step_run(step=f"evaluate-{number}", tracking_uri=store, experiment=EXPERIMENT) as run:
            run.log_metrics({"x": 1.0})

    # The experiment is new, too. SIGTERM handlers need the main thread, so threads do without.
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(one, range(4)))
    (parent,) = parents()
    assert {child.data.tags["mlflow.parentRunId"] for child in children()} == {parent.info.run_id}
    assert len(children()) == 4


@pytest.mark.slow
def test_processes_that_make_the_database_together(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/new/mlflow.db"
    script = f"from skd_lib.tracking.client import connect; connect({uri!r})"
    processes = [subprocess.Popen([sys.executable, "-c", script]) for _ in range(3)]
    assert [process.wait(60) for process in processes] == [0, 0, 0]
    assert check_tracking(uri) is None


def test_by_hand_each_step_is_a_pipeline_run_of_its_own(
    store: str, parents: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("KFP_RUN_ID")
    for _ in range(2):
        with step_run(step="evaluate", tracking_uri=store, experiment=EXPERIMENT):
            pass
    assert len(parents()) == 2


@pytest.mark.parametrize("rank", ["", "1"])
def test_null_run_has_the_same_methods(
    rank: str, store: str, parents: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", rank)
    uri = store if rank else ""
    with step_run(step="s", tracking_uri=uri, experiment=EXPERIMENT, params={"a": 1}) as run:
        run.log_metrics({"x": 1.0}, step=1)
        run.log_dataset("d", "0", "file")
        run.set_tags({"a": "b"})
        run.log_artifact(Path(__file__))
        run.parent.log_metrics({"x": 1.0})
        assert run.run_id == run.parent.run_id == ""
    assert parents() == []


def test_a_server_that_is_down_costs_seconds_and_one_warning(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    uri, asked, send = f"http://127.0.0.1:{_free_port()}", [], requests.Session.send

    def count(*args: Any, **options: Any) -> Any:
        asked.append(args)
        return send(*args, **options)

    monkeypatch.setattr(requests.Session, "send", count)
    with step_run(step="distill", tracking_uri=uri, experiment=EXPERIMENT, params={"lr": 1}) as run:
        for step in range(1000):
            run.log_metrics({"loss": 1.0}, step=step)
        assert run.run_id == ""
    assert 0 < len(asked) <= 4
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(warnings) == 2
    assert "does not answer" in warnings[0]
    assert "1002 entries are kept" in warnings[1]
    assert not close_pipeline_run(tracking_uri=uri, experiment=EXPERIMENT, pipeline_run_id="run-1", state="SUCCEEDED")
    error = check_tracking(uri)
    assert error is not None
    assert "does not answer" in str(error)


def test_a_store_that_comes_back_gets_everything(
    store: str, client: MlflowClient, children: Runs, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(outbox, "RETRY_SECONDS", 0.0)
    silent = True

    def flaky(client: MlflowClient, uri: str, name: str) -> str:
        if silent:
            raise ConnectionError("no route to host")
        return find_or_create_experiment(client, uri, name)

    monkeypatch.setattr(locate, "find_or_create_experiment", flaky)
    with step_run(step="distill", tracking_uri=store, experiment=EXPERIMENT, params={"lr": 1}) as run:
        run.log_metrics({"loss": 1.0}, step=1)
        silent = False
        run.log_metrics({"loss": 2.0}, step=2)
    (child,) = children()
    assert [point.value for point in client.get_metric_history(child.info.run_id, "loss")] == [1.0, 2.0]
    assert child.info.status == "FINISHED"
    assert child.data.params == {"skd/lr": "1"}
    assert caplog.text.count("does not answer") == 1


@pytest.mark.parametrize(
    ("state", "status", "left_running"),
    [("SUCCEEDED", "FINISHED", "FINISHED"), ("FAILED", "FAILED", "FAILED"), ("CANCELLED", "KILLED", "KILLED")],
)
def test_closing_the_pipeline_run(
    state: str, status: str, left_running: str, store: str, client: MlflowClient, parents: Runs, children: Runs
) -> None:
    with step_run(step="prepare_data", tracking_uri=store, experiment=EXPERIMENT) as run:
        parent_id, experiment_id = run.parent.run_id, client.get_run(run.run_id).info.experiment_id
    client.create_run(experiment_id, tags={"mlflow.parentRunId": parent_id, "kfp.task": "distill"})  # died silently
    assert close_pipeline_run(
        tracking_uri=store, experiment=EXPERIMENT, pipeline_run_id="run-1", state=state, error="x"
    )
    (parent,) = parents()
    assert parent.info.status == status
    assert parent.data.tags["skd.final_state"] == {"CANCELLED": "CANCELED"}.get(state, state)
    assert parent.data.tags.get("skd.error") == (None if state == "SUCCEEDED" else "x")
    assert {child.data.tags["kfp.task"]: child.info.status for child in children()} == {
        "prepare_data": "FINISHED",
        "distill": left_running,
    }
    # A run that is resumed after its end is open again.
    with step_run(step="distill", tracking_uri=store, experiment=EXPERIMENT):
        assert parents()[0].info.status == "RUNNING"


def test_closing_a_run_that_never_was(store: str) -> None:
    assert not close_pipeline_run(tracking_uri=store, experiment=EXPERIMENT, pipeline_run_id="other", state="FAILED")
    assert not close_pipeline_run(tracking_uri="", experiment=EXPERIMENT, pipeline_run_id="other", state="FAILED")


@pytest.mark.slow
def test_sigterm_leaves_the_run_killed(store: str, children: Runs, tmp_path: Path) -> None:
    script = (
        "import sys, time\n"
        "from skd_lib.tracking.runs import step_run\n"
        f"with step_run(step='distill', tracking_uri={store!r}, experiment={EXPERIMENT!r}):\n"
        "    print('ready', flush=True)\n"
        "    time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 128 + signal.SIGTERM
    (child,) = children()
    assert child.info.status == "KILLED"
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.parametrize("uri", ["file:./mlruns", "./mlruns", "sqlite://", "mlruns.db"])
def test_uris_that_can_never_work(uri: str) -> None:
    with (
        pytest.raises(SkdError, match="hint: use `sqlite:///"),
        step_run(step="s", tracking_uri=uri, experiment=EXPERIMENT),
    ):
        pass
    error = check_tracking(uri)
    assert error is not None
    assert uri in error.where


def test_sqlite_file_where_no_folder_can_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(SkdError, match="cannot create the folder"):
        connect(f"sqlite:///{tmp_path}/file/mlflow.db")


def test_a_file_that_is_no_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlflow.store.db.utils.MAX_RETRY_COUNT", 1)  # MLflow would try for a minute and a half
    (tmp_path / "mlflow.db").write_text("This is not a database. " * 100, encoding="utf-8")
    with pytest.raises(SkdError, match="cannot open the sqlite file"):
        connect(f"sqlite:///{tmp_path}/mlflow.db")


def test_a_deleted_experiment_is_named_before_the_run_and_ends_no_step_of_it(
    store: str, client: MlflowClient, caplog: pytest.LogCaptureFixture
) -> None:
    client.delete_experiment(find_or_create_experiment(client, store, EXPERIMENT))
    found = check_tracking(store, EXPERIMENT)
    assert found is not None
    assert "was deleted" in found.what
    assert "mlflow experiments restore --experiment-id 1" in found.hint
    with step_run(step="s", tracking_uri=store, experiment=EXPERIMENT):
        pass
    assert not close_pipeline_run(tracking_uri=store, experiment=EXPERIMENT, pipeline_run_id="run-1", state="SUCCEEDED")
    assert pipeline_record(tracking_uri=store, experiment=EXPERIMENT, pipeline_run_id="run-1") == PipelineRecord()
    assert "takes nothing: the MLflow experiment `skd-test` was deleted" in caplog.text
    assert "restore it (`mlflow experiments restore --experiment-id 1`)" in caplog.text


def test_what_is_logged_while_the_experiment_is_deleted_arrives_once_it_is_restored(
    store: str, client: MlflowClient, children: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbox, "RETRY_SECONDS", 0.0)
    monkeypatch.setattr(outbox, "SILENCE_FACTOR", 0)
    with step_run(step="s", tracking_uri=store, experiment=EXPERIMENT, params={"a": 1}) as run:
        experiment = find_or_create_experiment(client, store, EXPERIMENT)
        for step in range(6):
            if step == 2:
                client.delete_experiment(experiment)
                run.log_params({"b": 2})
                run.log_text("x", "x.txt")
                run.set_tags({"c": 3})
            if step == 4:
                client.restore_experiment(experiment)
            run.log_metrics({"loss": float(step)}, step=step)
    (child,) = children()
    assert child.info.status == "FINISHED"
    assert child.data.params == {"skd/a": "1", "skd/b": "2"}
    assert child.data.tags["c"] == "3"
    assert [point.step for point in client.get_metric_history(child.info.run_id, "loss")] == list(range(6))


def test_of_what_a_server_refuses_one_value_is_left_out(
    store: str, children: Runs, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    log_batch = MlflowClient.log_batch

    def as_before(
        self: MlflowClient, run_id: str, metrics: Any = (), params: Any = (), tags: Any = (), **_: Any
    ) -> None:
        if any(len(param.value) > 500 for param in params) or any(len(item.key) > 250 for item in [*params, *tags]):
            raise MlflowException("had length that exceeded the limit", error_code=INVALID_PARAMETER_VALUE)
        log_batch(self, run_id, metrics, params, tags)

    monkeypatch.setattr(MlflowClient, "log_batch", as_before)
    values = {f"p{number}": number for number in range(130)} | {"prompt": "x" * 900, "k" * 300: 1, "last": 2}
    for _ in range(2):  # a second time nothing differs
        with step_run(step="s", tracking_uri=store, experiment=EXPERIMENT, params=values) as run:
            run.set_tags({"fine": 1, "t" * 300: 2})
            run.log_metrics({"no\nsuch key": 1.0, "loss": 2.0})
    (child,) = children()
    assert len(child.data.params) == 131
    assert child.data.params["skd/last"] == "2"
    assert child.data.tags["fine"] == "1"
    assert child.data.metrics == {"loss": 2.0}
    assert not [tag for tag in child.data.tags if tag.startswith("skd.changed")]
    assert "MLflow does not take skd/prompt, which is left out" in caplog.text


def test_no_telemetry(store: str) -> None:
    script = (
        "from skd_lib.tracking.client import connect\n"
        f"connect({store!r})\n"
        "from mlflow.telemetry import get_telemetry_client\n"
        "assert get_telemetry_client() is None\n"
    )
    environment = {key: value for key, value in os.environ.items() if "TELEMETRY" not in key and key != "DO_NOT_TRACK"}
    subprocess.run([sys.executable, "-c", script], check=True, env=environment)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
