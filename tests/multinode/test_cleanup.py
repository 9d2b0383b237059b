"""What the exit handler finds of a run's TrainJobs and deletes, against a server that speaks Kubernetes' REST API."""

from __future__ import annotations

import json
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from typer.testing import CliRunner

from skd_lib.config import EnginePodsConfig, MultinodeConfig
from skd_lib.multinode import cleanup
from skd_lib.multinode.cleanup import delete_abandoned
from skd_lib.multinode.cluster import ROLE_HINT
from skd_lib.multinode.manifest import server_name, server_pods, server_secret, train_job
from skd_lib.steps import finish, kubeflow
from skd_lib.tracking.ending import Seen
from tests.multinode.fake_kubernetes import JOBS, STEP_POD, FakeKubernetes, running
from tests.support import http

ROLE = Path(__file__).parents[2] / "pipelines/deploy/multinode/role.yaml"
ENDS = ["records closed", "*demo* failed"]


@pytest.fixture
def kubernetes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeKubernetes]:
    with running() as server:
        monkeypatch.setenv("KUBECONFIG", str(server.kubeconfig(tmp_path)))
        monkeypatch.setenv("KFP_RUN_ID", "run-1")
        monkeypatch.setenv("KFP_POD_NAME", "finish-pod")
        yield server


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """How a run's end is recorded and told."""
    received: list[str] = []
    monkeypatch.setattr(kubeflow, "ask", lambda _: Seen())
    monkeypatch.setattr(finish, "close_run", lambda *_, **__: received.append("records closed"))

    class Channel(http.Handler):
        def do_POST(self) -> None:
            received.append(json.loads(self.rfile.read(int(self.headers["Content-Length"])))["text"].split("\n")[0])
            self.send_response(200)
            self.end_headers()

    with http.Server(Channel) as server:
        monkeypatch.setenv("SKD_NOTIFY_WEBHOOK", f"{server.url}/hook")
        yield received


def add(kubernetes: FakeKubernetes, name: str, run_id: str = "run-1") -> str:
    kubernetes.create(train_job(name, MultinodeConfig(nodes=2), STEP_POD, run_id=run_id, arguments=["gs://b/x"]))
    kubernetes.add_node(name, 0)
    return name


def run_finish() -> str:
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(finish.main)
    status = '{"state": "FAILED", "error": {"message": "out of memory"}}'
    result = CliRunner().invoke(app, ["--status", status, "--run-name", "demo"])
    assert result.exit_code == 0, f"{result.output}\n{result.exception!r}"
    return result.output


def test_what_has_not_ended_is_deleted_before_the_run_is_told(kubernetes: FakeKubernetes, ends: list[str]) -> None:
    running_job, suspended = add(kubernetes, "skd-distill-1"), add(kubernetes, "skd-teacher-sft-1")
    kubernetes.jobs[suspended]["status"] = {"conditions": [{"type": "Suspended", "status": "True"}]}
    failed, complete, deleting = (add(kubernetes, f"skd-distill-{number}") for number in (2, 3, 4))
    kubernetes.end(failed, "Failed", "a job has failed", "JobsFailed")
    kubernetes.end(complete)
    kubernetes.jobs[deleting]["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    other = add(kubernetes, "skd-distill-5", run_id="run-10")
    kubernetes.on_delete = lambda job: ends.append(f"{job['metadata']['name']} deleted")
    output = run_finish()
    assert set(kubernetes.jobs) == {failed, complete, deleting, other}
    assert ends == [f"{running_job} deleted", f"{suspended} deleted", *ENDS]
    assert f"TrainJobs without a step, deleted: {running_job}, {suspended}" in output
    assert "TrainJobs" not in run_finish()  # tried again, it finds nothing


def test_a_run_whose_id_is_no_label_finds_its_own(kubernetes: FakeKubernetes) -> None:
    names = {run_id: add(kubernetes, f"job-{number}", run_id) for number, run_id in enumerate(["my run", "my run "])}
    assert delete_abandoned("my run") == [names["my run"]]
    assert set(kubernetes.jobs) == {names["my run "]}


@pytest.mark.parametrize(
    ("status", "level", "told"),
    [
        (404, "INFO", "this cluster has no TrainJobs"),
        (403, "INFO", r"forbidden(.|\n)*pipelines/deploy/multinode"),
        (401, "WARNING", "whether this run's TrainJobs go on is not known(.|\n)*not allowed"),
    ],
)
def test_a_refused_list_is_told_and_nothing_else_fails(
    kubernetes: FakeKubernetes,
    ends: list[str],
    caplog: pytest.LogCaptureFixture,
    status: int,
    level: str,
    told: str,
) -> None:
    name = add(kubernetes, "skd-distill-1")
    kubernetes.refused["GET"] = [status]
    with caplog.at_level("INFO"):
        run_finish()
    (line,) = [record for record in caplog.records if record.name == cleanup.__name__]
    assert line.levelname == level
    assert re.search(told, line.getMessage())
    assert set(kubernetes.jobs) == {name}
    assert ends == ENDS


def test_a_refused_deletion_is_told_with_what_to_do_and_the_next_is_tried(
    kubernetes: FakeKubernetes, ends: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(3):
        add(kubernetes, f"job-{number}")
    kubernetes.refused["DELETE"] = [403, 404]  # not allowed; gone by itself meanwhile
    output = run_finish()
    assert "TrainJobs without a step, deleted: job-2\n" in output
    (line,) = [record for record in caplog.records if record.name == cleanup.__name__]
    assert line.levelname == "WARNING"
    assert "`kubectl delete trainjob job-0 -n team`" in line.getMessage()
    assert ends == ENDS


def test_a_server_that_is_away_is_not_waited_for_long(
    kubernetes: FakeKubernetes,
    ends: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert cleanup.DEADLINE_SECONDS <= 60
    monkeypatch.setattr(delete_abandoned, "__defaults__", (1.0,))
    add(kubernetes, "job-0")
    add(kubernetes, "job-1")
    kubernetes.away_until = time.monotonic() + 60
    begin = time.monotonic()
    run_finish()
    assert time.monotonic() - begin < 10
    assert "whether this run's TrainJobs go on is not known" in caplog.text

    kubernetes.away_until = 0
    kubernetes.refused["DELETE"] = [503] * 9  # away once it has told of the jobs
    caplog.clear()
    run_finish()
    assert "`kubectl delete trainjob job-0 job-1 -n team`" in caplog.text
    assert set(kubernetes.jobs) == {"job-0", "job-1"}
    assert kubernetes.requests.count(f"DELETE {JOBS}/job-1") == 0

    with socket.socket() as taken:  # bound, without a listener
        taken.bind(("127.0.0.1", 0))
        settings = json.loads((tmp_path / "kubeconfig").read_text())
        settings["clusters"][0]["cluster"]["server"] = f"http://127.0.0.1:{taken.getsockname()[1]}"
        (tmp_path / "kubeconfig").write_text(json.dumps(settings))
        caplog.clear()
        run_finish()
    assert "refused" in caplog.text
    assert ends == ENDS * 3


def test_a_short_outage_is_waited_for(kubernetes: FakeKubernetes) -> None:
    add(kubernetes, "job-0")
    kubernetes.refused["GET"] = [503]
    kubernetes.refused["DELETE"] = [500]
    assert delete_abandoned("run-1") == ["job-0"]


@pytest.mark.parametrize("answer", [b"no JSON", b'{"kind": "TrainJobList"}'])
def test_not_even_nonsense_fails_the_end_of_a_run(
    kubernetes: FakeKubernetes,
    ends: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    answer: bytes,
) -> None:
    class Nonsense(http.Handler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(answer)

    with http.Server(Nonsense) as server:
        monkeypatch.setattr(kubernetes, "address", server.url)
        kubernetes.kubeconfig(tmp_path)
        run_finish()
    assert "TrainJobs of this run may go on" in caplog.text
    assert ends == ENDS


def test_servers_are_deleted_although_the_jobs_cannot_be(
    kubernetes: FakeKubernetes, ends: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(_: str) -> list[str]:
        raise RuntimeError

    monkeypatch.setattr(cleanup, "delete_abandoned", broken)
    (server,) = server_pods(STEP_POD, EnginePodsConfig(), run_id="run-1", image="i", gpus=1)
    name = server["metadata"]["name"]
    kubernetes.pods[name] = server
    kubernetes.secrets[server_name(STEP_POD)] = server_secret(STEP_POD, "run-1", "t0ken")
    assert f"vLLM servers without a step, deleted: {name}" in run_finish()
    assert "TrainJobs of this run may go on" in caplog.text
    assert (name in kubernetes.pods, kubernetes.secrets, ends) == (False, {}, ENDS)


@pytest.mark.parametrize("variable", ["KFP_POD_NAME", "KFP_RUN_ID"])
def test_outside_of_a_pipelines_pod_nothing_is_asked(
    kubernetes: FakeKubernetes,
    ends: list[str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    variable: str,
) -> None:
    """As under `skd run` on a machine whose user has a KUBECONFIG."""
    monkeypatch.delenv(variable)
    with caplog.at_level("INFO"):
        run_finish()
    assert kubernetes.requests == []
    assert not [record for record in caplog.records if "multinode" in record.name]
    assert ends == ENDS


def test_a_pod_that_cannot_reach_its_cluster_says_so(
    ends: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("KUBECONFIG", "KUBERNETES_SERVICE_HOST"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("KFP_RUN_ID", "run-1")
    monkeypatch.setenv("KFP_POD_NAME", "finish-pod")
    run_finish()
    assert "whether this run's TrainJobs go on is not known" in caplog.text
    assert ends == ENDS


def test_the_role_allows_what_is_asked_and_no_more() -> None:
    role = next(yaml.safe_load_all(ROLE.read_text()))
    rules: dict[str, Any] = {rule["resources"][0]: rule["verbs"] for rule in role["rules"]}
    assert rules == {
        "trainjobs": ["get", "list", "create", "delete"],
        "pods": ["get", "list"],
        "pods/log": ["get"],
    }
    assert "trainjobs get, list, create and delete; pods get and list; pods/log get" in ROLE_HINT
