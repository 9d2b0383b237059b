"""A password in a URI appears nowhere: not on the console, nor in files, records or notices."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from mlflow import MlflowClient
from typer.testing import CliRunner

import skd_kfp.pipelines.cli
from skd_kfp.pipelines.kubeflow.submit import Package, Submission, Target
from skd_lib.config import RunConfig
from skd_lib.errors import SkdErrors
from skd_lib.preflight.checks import TRACKING, Checks, PreflightReport
from skd_lib.preflight.environment import check_tracking_store
from skd_lib.steps.notify import Message
from skd_lib.tracking.client import run_url
from skd_lib.tracking.runs import close_pipeline_run, step_run
from tests.kubeflow import small

from .conftest import EXPERIMENT

PASSWORD = "hunter2pw"
DEAD = f"http://bob:{PASSWORD}@127.0.0.1:9"
URIS = [
    DEAD,
    f"http://127.0.0.1:9/?token={PASSWORD}",
    f"http://bob:{PASSWORD}/x@127.0.0.1:9",  # `/` is not quoted, so that it is no URL
    f"ftp://bob:{PASSWORD}@127.0.0.1:9",
    f"postgresql://bob:{PASSWORD}@127.0.0.1:9/db",
]
CONFIG = {
    "name": "tiny",
    "teacher": "t",
    "student": "s",
    "data": {"source": {"type": "files", "train": ["/data/train.jsonl"]}},
}


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")


def _everything_in(folder: Path) -> str:
    return "".join(file.read_bytes().decode(errors="replace") for file in folder.rglob("*") if file.is_file())


@pytest.mark.slow
@pytest.mark.parametrize("uri", URIS[:2])
@pytest.mark.parametrize(
    "command",
    [
        ["promote", "m", "1", "--why", "x"],
        ["rollback", "m", "--why", "x"],
        ["lineage", "m"],
        ["report", "0" * 32],
        ["run", "CONFIG", "--dry-run"],
        ["compare", "CONFIG", "--dry-run"],
        ["submit", "CONFIG", "--dry-run"],
        ["submit", "CONFIG", "--host", "HOST"],
        ["track", "replay", "FILE"],
    ],
    ids=lambda command: "-".join(command[:1] + command[2:3]),
)
def test_commands(
    command: list[str], uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("skd_kfp.pipelines.compiling.compile_pipeline", lambda: Package.read().documents)
    (tmp_path / "run.json").write_text(json.dumps(CONFIG))
    place = {"experiment": "e", "pipeline_run_id": "r", "step": "s", "run_name": None, "mlflow_run_id": ""}
    (tmp_path / "left.jsonl").write_text(
        json.dumps({**place, "tracking_uri": "http://127.0.0.1:9", "started": 1}) + "\n"
    )
    places = {"CONFIG": "run.json", "FILE": "left.jsonl", "HOST": f"ftp://bob:{PASSWORD}@127.0.0.1:9"}
    arguments = [places.get(word, word) for word in command]
    # Each message is clean by itself, and `main` cleans what it prints.
    alone = CliRunner().invoke(skd_kfp.pipelines.cli.app, [*arguments, "--tracking-uri", uri])
    assert PASSWORD not in alone.output + str(alone.exception)
    monkeypatch.setattr(sys, "argv", ["skd", *arguments, "--tracking-uri", uri])
    with pytest.raises(SystemExit):
        skd_kfp.pipelines.cli.main()
    out, errors = capsys.readouterr()
    assert PASSWORD not in out + errors
    assert out + errors
    assert PASSWORD not in _everything_in(tmp_path)


@pytest.mark.parametrize("uri", URIS)
def test_preflight(uri: str) -> None:
    checks = Checks()
    checks.attempt(TRACKING, lambda: check_tracking_store(checks, uri))
    report = PreflightReport(checks.found)
    assert not report.tracking_works
    assert PASSWORD not in f"{report.markdown()}{report.errors()}{[str(error) for error in report.errors()]}"


def test_a_preflight_that_succeeds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("skd_lib.tracking.client.check_tracking", lambda *_: None)
    checks = Checks()
    check_tracking_store(checks, DEAD)
    assert [check.what for check in checks.found] == ["MLflow answers at http://127.0.0.1:9"]


def test_a_step_whose_store_is_down(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def fail() -> None:
        with step_run(step="s", tracking_uri=DEAD, experiment=EXPERIMENT, params={"uri": DEAD}) as run:
            run.set_tags({"uri": DEAD})
            run.log_text(DEAD, "a.txt")
            raise RuntimeError(f"cannot reach {DEAD}")

    with pytest.raises(RuntimeError):
        fail()
    close_pipeline_run(tracking_uri=DEAD, experiment=EXPERIMENT, pipeline_run_id="run-1", state="FAILED", error=DEAD)
    assert "track replay" in caplog.text
    assert PASSWORD not in caplog.text
    assert PASSWORD not in _everything_in(tmp_path)


def test_what_a_store_keeps(store: str, client: MlflowClient, tmp_path: Path) -> None:
    def fail() -> None:
        with step_run(step="s", tracking_uri=store, experiment=EXPERIMENT, params={"a": {"uri": DEAD}}) as run:
            run.set_tags({"uri": DEAD})
            run.log_text(f"at {DEAD}", "a.txt")
            raise RuntimeError(f"cannot reach {DEAD}")

    with pytest.raises(RuntimeError):
        fail()
    close_pipeline_run(tracking_uri=store, experiment=EXPERIMENT, pipeline_run_id="run-1", state="FAILED", error=DEAD)
    assert PASSWORD not in _everything_in(tmp_path)
    assert "127.0.0.1:9" in _everything_in(tmp_path)


STEP = """
import sys
from skd_lib.errors import SkdError
from skd_lib.steps.runtime import run_step

def main(tracking_uri: str) -> None:
    print("asking", tracking_uri)
    {body}

run_step(main)
"""


@pytest.mark.parametrize("body", ["raise SkdError(tracking_uri)", "raise ValueError(tracking_uri.split('@')[0])"])
def test_what_a_step_prints(body: str, tmp_path: Path) -> None:
    (tmp_path / "step.py").write_text(STEP.format(body=body))
    done = subprocess.run(
        [sys.executable, str(tmp_path / "step.py"), DEAD],
        capture_output=True,
        text=True,
        check=False,
        env={"PYTHONPATH": str(Path(__file__).parents[2]), "SKD_EVENTS": "1"},
    )
    assert done.returncode in (1, 2, 70)
    assert "asking http://***@127.0.0.1:9" in done.stdout
    assert PASSWORD not in done.stdout + done.stderr


def test_a_notice_and_links(client: MlflowClient) -> None:
    ending = Message("r", "FAILED", f"step s: cannot reach {DEAD}", {"MLflow": f"{DEAD}/#/runs/1"})
    assert PASSWORD not in ending.text()
    run = client.create_run(client.create_experiment("x"))
    assert PASSWORD not in run_url(f"{DEAD}/?token={PASSWORD}", run)


def test_kubeflow_gets_no_password() -> None:
    with pytest.raises(SkdErrors) as caught:
        Submission.plan(RunConfig.model_validate(CONFIG), small.package(), Target(pipeline_root=DEAD))
    (problem,) = caught.value.errors
    assert "holds a password" in problem.what
    assert PASSWORD not in str(problem)
