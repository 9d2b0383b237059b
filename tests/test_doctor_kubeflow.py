from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from skd_lib.cli import app
from skd_lib.doctor import Grade
from skd_lib.doctor_kubeflow import CONTROLLER, examine_kubeflow, retries


def settings(**strategy: str) -> dict[str, str]:
    return {"workflowDefaults": yaml.safe_dump({"spec": {"templateDefaults": {"retryStrategy": strategy}}})}


@pytest.mark.parametrize(
    ("data", "grade", "found"),
    [
        ({}, Grade.OK, "a step that fails, runs out of memory or is evicted is tried again; one whose pod is deleted"),
        ({"workflowDefaults": "spec: {}"}, Grade.OK, "is tried again; one whose pod is deleted is not"),
        (settings(limit="2", retryPolicy="OnError"), Grade.WARN, "is evicted is NOT tried again"),  # stock 2.17.0
        (settings(limit="0", retryPolicy="Always"), Grade.OK, "a step is tried again however it failed"),
        (settings(limit="2", retryPolicy="Always"), Grade.WARN, "every level of the graph is tried again 2 times"),
        (settings(limit="2"), Grade.WARN, "attempts multiply"),
        (settings(limit="0", retryPolicy="New"), Grade.WARN, "retryPolicy New is unknown here"),
        ({"workflowDefaults": "[1, 2"}, Grade.OK, "is tried again"),
        (
            {"config": yaml.safe_dump({"workflowDefaults": yaml.safe_load(settings(limit="1")["workflowDefaults"])})},
            Grade.WARN,
            "tried again 1 times",
        ),
    ],
)
def test_what_the_controllers_settings_make_of_retries(data: dict[str, str], grade: Grade, found: str):
    finding = retries(data)
    assert finding.grade is grade
    assert found in finding.found
    assert ("limit: '0'" in finding.advice) == (grade is Grade.WARN)


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, object]]:
    """A Kubernetes API that has the ConfigMap in `kubeflow`, unless it is told to refuse."""
    answer: dict[str, object] = {"status": 200, "data": settings(limit="2", retryPolicy="OnError")}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            found = self.path == f"/api/v1/namespaces/kubeflow/configmaps/{CONTROLLER}"
            body = json.dumps({"kind": "ConfigMap", "data": answer["data"]}).encode()
            self.send_response(int(str(answer["status"])) if found else 404)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            del args

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        address = {"server": f"http://127.0.0.1:{server.server_port}"}
        file = tmp_path / "kubeconfig"
        contexts = [{"name": "c", "context": {"cluster": "c", "user": "u"}}]
        file.write_text(
            yaml.safe_dump(
                {
                    "current-context": "c",
                    "clusters": [{"name": "c", "cluster": address}],
                    "contexts": contexts,
                    "users": [{"name": "u", "user": {}}],
                }
            ),
            encoding="utf-8",
        )
        monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(file))
        monkeypatch.setattr("kubernetes.config.KUBE_CONFIG_DEFAULT_LOCATION", str(file))
        yield answer
        server.shutdown()


def test_the_cluster_is_asked(cluster: dict[str, object]):
    (finding,) = examine_kubeflow("kubeflow")
    assert "NOT tried again" in finding.found
    assert examine_kubeflow("elsewhere") == []
    cluster["status"] = 403
    assert examine_kubeflow("kubeflow") == []


def test_without_a_cluster_nothing_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr("kubernetes.config.KUBE_CONFIG_DEFAULT_LOCATION", str(tmp_path / "none"))
    assert examine_kubeflow("kubeflow") == []


def test_the_command_says_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    from skd_lib import doctor_kubeflow

    monkeypatch.setattr("skd_lib.doctor.examine", lambda *_: [])
    monkeypatch.setattr(doctor_kubeflow, "read_controller", lambda _: settings(limit="2", retryPolicy="OnError"))
    done = CliRunner().invoke(app, ["doctor", "--kubeflow"])
    assert done.exit_code == 0, done.output
    assert "retries" in done.output
    assert "retries" not in CliRunner().invoke(app, ["doctor"]).output
