"""The same against a real tracking server on this machine."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from skd_lib.tracking.client import check_tracking, connect
from skd_lib.tracking.registry import champion, register
from skd_lib.tracking.runs import close_pipeline_run, step_run

from .conftest import EXPERIMENT


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, empty_store: Path) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("server")
    (folder / "mlflow.db").write_bytes(empty_store.read_bytes())
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += [
        "--backend-store-uri",
        f"sqlite:///{folder}/mlflow.db",
        "--artifacts-destination",
        str(folder / "files"),
    ]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            command,
            cwd=folder,
            stdout=log,
            stderr=log,
            start_new_session=True,
            env={**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
        )
    uri = f"http://127.0.0.1:{port}"
    try:
        _wait_for(uri, process, folder / "log")
        yield uri
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


def _wait_for(uri: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(f"{uri}/health", timeout=2):  # noqa: S310
                return
        except OSError:
            time.sleep(0.2)
    pytest.fail(f"the server did not start:\n{log.read_text()[-2000:]}")


@pytest.mark.slow
def test_runs_and_registry_over_http(server: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert check_tracking(server) is None
    client = connect(server)
    with step_run(step="distill", tracking_uri=server, experiment=EXPERIMENT, params={"lr": 1e-3}) as run:
        run.log_metrics({f"m{i}": 1.0 for i in range(1100)}, step=1)
        run.log_dataset("train", "ab" * 32, "gs://bucket/train.jsonl")
        run.log_text("{}", "summary.json")
        parent_id = run.parent.run_id
    with step_run(step="distill", tracking_uri=server, experiment=EXPERIMENT, params={"lr": 1e-3}) as again:
        assert again.run_id == run.run_id
        assert again.last_step("m7") == 1
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
    found = champion(tracking_uri=server, model_name="skd-student")
    assert found is not None
    assert (found.version, found.figures) == ("2", {"chrf": 30.0})

    assert close_pipeline_run(tracking_uri=server, experiment=EXPERIMENT, pipeline_run_id="run-1", state="SUCCEEDED")
    assert client.get_run(parent_id).info.status == "FINISHED"
