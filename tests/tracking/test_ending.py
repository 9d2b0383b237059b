"""How each kind of end is recorded and told: through the step `finish`, MLflow, Kubeflow's API and a channel."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import typer
from mlflow import MlflowClient
from typer.testing import CliRunner

from skd_lib.steps import finish, kubeflow, notify
from skd_lib.steps.notify import Message
from skd_lib.tracking.client import find_or_create_experiment
from skd_lib.tracking.ending import Seen, find_ending
from skd_lib.tracking.triggered import TRIGGER_TAG, run_for
from tests.support import http

from .conftest import EXPERIMENT, Runs

ERROR = "SkdError: the file is empty (train.jsonl). Fill it"
DEAD = "its process was killed (out of memory, eviction, pre-emption"
NO_DRIVER = "Kubeflow could not start it; the reason is in the log of the pod of"


@dataclass(frozen=True)
class Case:
    """A way in which a run ends, as KFP 2.15 to 2.17 or its version without MLMD were seen or read to tell it.

    Attributes:
        word: What KFP tells `finish`.
        steps: Status of each step's MLflow run.
        api: What the API tells; None: it is out of reach.
        state: What it is.
        reason: What is told of it.
        untracked: State and reason without MLflow, where they differ.
        message: KFP's.
    """

    word: str
    steps: dict[str, str]
    api: dict[str, Any] | None
    state: str
    reason: str = ""
    untracked: tuple[str, str] | None = None
    message: str = ""


def run(state: str = "RUNNING", history: tuple[str, ...] = (), **tasks: str) -> dict[str, Any]:
    """The API's record of a run."""
    details = [
        {"display_name": name.replace("_", "-"), "state": end, "end_time": f"2026-01-01T00:00:{number:02}Z"}
        for number, (name, end) in enumerate(tasks.items())
    ]
    states = [{"state": passed} for passed in (*history, state)]
    return {"run_id": "run-1", "state": state, "state_history": states, "run_details": {"task_details": details}}


def ended(state: str, **tasks: str) -> dict[str, Any]:
    """The record of a run whose exit handler is at work."""
    record = run(**tasks, exit_handler_1=state)
    record["run_details"]["task_details"].append({"display_name": "exit-handler-1.onExit", "state": "RUNNING"})
    return record


def without_mlmd(handler: str, message: str = "", **tasks: str) -> dict[str, Any]:
    """The record as KFP's version without MLMD has it, of a run whose exit handler is at work."""
    listed = [
        {"name": name.replace("_", "-"), "state": end, "type": "RUNTIME", "status_metadata": {"message": message}}
        for name, end in tasks.items()
    ]
    handled = {"name": "distillation", "state": handler, "type": "EXIT_HANDLER"}
    return {"run_id": "run-1", "state": "RUNNING", "task_count": 2, "tasks": [*listed, handled]}


DONE = {"preflight": "FINISHED", "distill": "FINISHED", "report": "FINISHED", "register_model": "FINISHED"}
COMPARED = {"preflight": "FINISHED", "compare_table": "FINISHED"}
UNKNOWN = ("", "")
CASES = {
    "success": Case("COMPLETE", DONE, run(), "SUCCEEDED"),
    "success without MLMD": Case("SUCCEEDED", DONE, None, "SUCCEEDED"),
    "all cached": Case("CACHED", {}, None, "SUCCEEDED"),
    "skipped": Case("SKIPPED", {}, None, "SUCCEEDED"),
    "nested DAGs cached": Case("RUNNING", DONE, None, "SUCCEEDED", untracked=UNKNOWN),
    "iterations cached": Case("RUNNING", COMPARED, None, "SUCCEEDED", untracked=UNKNOWN),
    "iterations cached, with API": Case("RUNNING", COMPARED, ended("SUCCEEDED"), "SUCCEEDED"),
    "a step was tried again": Case(
        "RUNNING", DONE, ended("SUCCEEDED", **{"executor(0)": "FAILED", "distill": "SUCCEEDED"}), "SUCCEEDED"
    ),
    "step failed": Case(
        "FAILED", {"prepare_data": "FAILED"}, None, "FAILED", f"prepare_data: {ERROR}", untracked=("FAILED", "")
    ),
    "step failed, with API": Case(
        "FAILED",
        {"prepare_data": "FAILED"},
        ended("FAILED", prepare_data="FAILED", prepare="FAILED"),
        "FAILED",
        f"prepare_data: {ERROR}",
        untracked=("FAILED", "prepare-data: it failed; the reason is in its log"),
    ),
    "step failed without MLMD": Case(
        "FAILED", {"distill": "FAILED"}, None, "FAILED", f"distill: {ERROR}", ("FAILED", "exit code 2"), "exit code 2"
    ),
    "untracked step failed": Case(
        "FAILED",
        {"preflight": "FINISHED"},
        ended("FAILED", show_teacher="FAILED"),
        "FAILED",
        "show-teacher: it failed; the reason is in its log",
    ),
    "step killed": Case(
        "RUNNING", {"distill": "RUNNING"}, None, "FAILED", f"distill: {DEAD}, or stopped by a person)", UNKNOWN
    ),
    "step killed, with API": Case(
        "RUNNING",
        {"distill": "RUNNING"},
        ended("FAILED", distill="FAILED"),
        "FAILED",
        f"distill: {DEAD})",
        ("FAILED", "distill: it failed; the reason is in its log"),
    ),
    "step stopped by someone or something": Case(
        "RUNNING",
        {"distill": "KILLED"},
        None,
        "STOPPED",
        "distill: it was stopped (eviction, pre-emption, the end of its time, or stopped by a person)",
        UNKNOWN,
    ),
    "pod deleted": Case(
        "RUNNING",
        {"distill": "KILLED"},
        ended("FAILED", distill="FAILED"),
        "FAILED",
        "distill: it was stopped (eviction, pre-emption, the end of its time)",
        ("FAILED", "distill: it failed; the reason is in its log"),
    ),
    "cancelled": Case("RUNNING", {"distill": "RUNNING"}, run("CANCELING", distill="FAILED"), "CANCELED"),
    "cancelled before": Case("RUNNING", {"distill": "KILLED"}, run("FAILED", ("CANCELING",)), "CANCELED"),
    "cancelled after a failure was told": Case("FAILED", {"distill": "FAILED"}, run("CANCELING"), "CANCELED"),
    "cancelled by KFP's word": Case("CANCELED", {"distill": "RUNNING"}, None, "CANCELED"),
    "driver failed": Case(
        "RUNNING",
        {"preflight": "FINISHED"},
        ended("FAILED", **{"distill-driver": "FAILED", "distil": "FAILED"}),
        "FAILED",
        f"distill: {NO_DRIVER} distill-driver",
    ),
    "nested DAG's driver failed": Case(
        "RUNNING",
        {"preflight": "FINISHED"},
        run(teacher_driver="FAILED"),
        "FAILED",
        f"teacher: {NO_DRIVER} teacher-driver",
    ),
    "first driver failed": Case(
        "RUNNING", {}, run(preflight_driver="FAILED"), "FAILED", f"preflight: {NO_DRIVER} preflight-driver"
    ),
    "driver failed, without API": Case(
        "RUNNING",
        {"preflight": "FINISHED"},
        None,
        "FAILED",
        "a step did not start: Kubeflow's part of it (its driver) failed; see the run's page",
        UNKNOWN,
    ),
    "driver failed without MLMD": Case(
        "RUNNING",
        {"preflight": "FINISHED"},
        without_mlmd("FAILED", "no such parameter", distill="FAILED"),
        "FAILED",
        "distill: no such parameter",
    ),
    "nested DAGs cached without MLMD": Case("RUNNING", DONE, without_mlmd("CACHED", distill="CACHED"), "SUCCEEDED"),
    "one iteration of a step failed": Case(
        "RUNNING",
        {"preflight": "FINISHED"},
        {
            **ended("FAILED"),
            "run_details": {
                "task_details": [
                    {"display_name": "distill-driver", "state": "FAILED", "end_time": "1"},
                    {"display_name": "distill-driver", "state": "SUCCEEDED", "end_time": "2"},
                ]
            },
        },
        "FAILED",
        f"distill: {NO_DRIVER} distill-driver",
    ),
    "API has stopped to tell tasks": Case("RUNNING", DONE, run(distill="RUNNING"), "SUCCEEDED", untracked=UNKNOWN),
}
STATUS = {"SUCCEEDED": "FINISHED", "FAILED": "FAILED", "CANCELED": "KILLED", "STOPPED": "KILLED"}


@dataclass
class Api:
    """What KFP's API answers, and what it was asked."""

    record: dict[str, Any] | None = None
    status: int = 200
    body: bytes = b""
    asked: list[tuple[str, str]] = field(default_factory=list)
    port: int = 0


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> Iterator[Api]:
    answers = Api()

    class Handler(http.Handler):
        def do_GET(self) -> None:
            answers.asked.append((self.path, self.headers.get("Authorization", "")))
            body = answers.body or json.dumps(answers.record).encode()
            self.send_response(answers.status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    with http.Server(Handler) as server:
        answers.port = server.server_port
        monkeypatch.setenv(kubeflow.HOST_VARIABLE, f"{server.url}/")
        yield answers


@pytest.fixture
def end(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Message]:
    """Run the step `finish`; the message that a channel would get."""
    messages: list[Message] = []
    monkeypatch.setattr(notify, "notify", lambda message: messages.append(message) or True)

    def finished(word: str, message: str = "", **options: str) -> Message:
        app = typer.Typer(pretty_exceptions_enable=False)
        app.command()(finish.main)
        status = json.dumps({"state": word, "error": {"message": message} if message else {}})
        words = [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", value)]
        result = CliRunner().invoke(app, ["--status", status, "--run-name", "demo", *words], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return messages.pop()

    return finished


def record_steps(client: MlflowClient, store: str, steps: dict[str, str]) -> str:
    """A parent run with the runs of its steps; its id."""
    experiment = find_or_create_experiment(client, store, EXPERIMENT)
    parent = client.create_run(experiment, tags={"kfp.pipeline_run_id": "run-1", TRIGGER_TAG: "skd-1"}).info.run_id
    for step, status in steps.items():
        told = {"skd.error": ERROR} if status == "FAILED" else {}
        child = client.create_run(experiment, tags={"mlflow.parentRunId": parent, "kfp.task": step, **told})
        if status != "RUNNING":
            client.set_terminated(child.info.run_id, status)
    return str(parent)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_end_is_told_truthfully(
    case: Case, store: str, client: MlflowClient, children: Runs, api: Api, end: Callable[..., Message]
) -> None:
    api.record, api.status = case.api, 200 if case.api else 503
    parent = record_steps(client, store, case.steps)
    told = end(case.word, case.message, tracking_uri=store, experiment=EXPERIMENT)
    assert (told.state, told.error) == (case.state, case.reason)
    closed = client.get_run(parent)
    assert closed.info.status == STATUS[case.state]
    assert closed.data.tags["skd.final_state"] == case.state
    assert closed.data.tags.get("skd.error", "") == case.reason
    assert {child.data.tags["kfp.task"]: child.info.status for child in children()} == {
        step: STATUS[case.state] if status == "RUNNING" else status for step, status in case.steps.items()
    }
    # The trigger's second guard: only what failed by itself is started again.
    assert (run_for("skd-1", tracking_uri=store) is None) == (case.state == "FAILED")


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_without_mlflow_kubeflow_alone_tells(case: Case, api: Api, end: Callable[..., Message]) -> None:
    api.record, api.status = case.api, 200 if case.api else 503
    told = end(case.word, case.message)
    assert (told.state, told.error) == (case.untracked or (case.state, case.reason))


@pytest.mark.parametrize(
    ("status", "body"),
    [(404, b"{}"), (302, b""), (200, b"<html>a login</html>"), (200, b"[]"), (200, b"null"), (200, b'{"run_id": ""}')],
)
def test_an_api_that_does_not_tell_changes_nothing(
    status: int, body: bytes, api: Api, end: Callable[..., Message]
) -> None:
    api.status, api.body = status, body
    assert end("RUNNING").state == ""
    assert end("FAILED").state == "FAILED"


def test_the_api_is_asked_once_with_the_pods_token(
    api: Api, end: Callable[..., Message], tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    api.record = run()
    (tmp_path / "token").write_text("abc\n")
    monkeypatch.setenv(kubeflow.TOKEN_VARIABLE, str(tmp_path / "token"))
    end("SUCCEEDED")
    assert api.asked == []  # where KFP's word says it all
    end("RUNNING")
    assert api.asked == [("/apis/v2beta1/runs/run-1", "Bearer abc")]
    for name in (kubeflow.HOST_VARIABLE, "KUBERNETES_SERVICE_HOST", "KFP_POD_NAME", "ML_PIPELINE_SERVICE_HOST"):
        monkeypatch.delenv(name, raising=False)
    assert kubeflow.ask("run-1") == Seen()  # outside of a cluster nobody is asked
    assert len(api.asked) == 1
    monkeypatch.setenv("ML_PIPELINE_SERVICE_HOST", "127.0.0.1")
    monkeypatch.setenv("ML_PIPELINE_SERVICE_PORT", str(api.port))
    assert kubeflow.ask("run-1").known


def test_where_the_api_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(kubeflow.HOST_VARIABLE, raising=False)
    assert kubeflow.address([]) == ""
    monkeypatch.setenv("KFP_POD_NAME", "finish-pod")
    assert kubeflow.address(["launcher"]) == "http://ml-pipeline.kubeflow:8888"
    server = ["--ml_pipeline_server_address", "ml-pipeline.team.svc.cluster.local", "--ml_pipeline_server_port", "8887"]
    launcher = ["launcher-v2", "--pipeline_name", "a=b", *server, "--ml_pipeline_tls_enabled=false", "--", "python3"]
    assert kubeflow.address(launcher) == "http://ml-pipeline.team.svc.cluster.local:8888"
    launcher.append("--ml_pipeline_tls_enabled=true")
    assert kubeflow.address(launcher) == "https://ml-pipeline.team.svc.cluster.local:8888"
    monkeypatch.setenv("ML_PIPELINE_SERVICE_HOST", "10.0.0.1")
    assert kubeflow.address(launcher) == "http://10.0.0.1:8888"


def test_a_run_that_is_run_again_after_its_end_has_the_later_end(
    store: str, client: MlflowClient, api: Api, end: Callable[..., Message]
) -> None:
    parent = record_steps(client, store, {"distill": "FAILED"})
    where = {"tracking_uri": store, "experiment": EXPERIMENT}
    assert end("FAILED", **where).error == f"distill: {ERROR}"
    assert end("SUCCEEDED", **where).error == ""
    assert "skd.error" not in client.get_run(parent).data.tags


def test_a_first_attempt_that_failed_is_not_how_the_run_ended() -> None:
    """Up to KFP 2.16.1 no later state takes away the FAILED that a first attempt left with the exit handler's DAG."""
    assert find_ending("FAILED", "", Seen(known=True, steps="SUCCEEDED"), []).state == "SUCCEEDED"
    assert find_ending("FAILED", "", Seen(known=True, steps="FAILED"), []).state == "FAILED"
    assert find_ending("FAILED", "", Seen(), []).state == "FAILED"
