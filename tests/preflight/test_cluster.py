from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from skd_kfp.pipelines.cli import app
from skd_lib.preflight.checks import Level
from skd_lib.preflight.cluster import CONTROLLER, check_retries, retries
from tests.support import http


def settings(**strategy: str) -> dict[str, str]:
    return {"workflowDefaults": yaml.safe_dump({"spec": {"templateDefaults": {"retryStrategy": strategy}}})}


def kubeconfig(server: str) -> str:
    """One that names a cluster at this address."""
    return yaml.safe_dump(
        {
            "current-context": "c",
            "clusters": [{"name": "c", "cluster": {"server": server}}],
            "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
            "users": [{"name": "u", "user": {}}],
        }
    )


@pytest.mark.parametrize(
    ("data", "level", "found"),
    [
        ({}, "ok", "a step that fails, runs out of memory or is evicted is tried again; one whose pod is deleted"),
        ({"workflowDefaults": "spec: {}"}, "ok", "is tried again; one whose pod is deleted is not"),
        (settings(limit="2", retryPolicy="OnError"), "warning", "is evicted is NOT tried again"),  # stock 2.17.0
        (settings(limit="0", retryPolicy="Always"), "ok", "a step is tried again however it failed"),
        (settings(limit="2", retryPolicy="Always"), "warning", "every level of the graph is tried again 2 times"),
        (settings(limit="2"), "warning", "attempts multiply"),
        (settings(limit="0", retryPolicy="New"), "warning", "retryPolicy New is unknown here"),
        ({"workflowDefaults": "[1, 2"}, "ok", "is tried again"),
        (
            {"config": yaml.safe_dump({"workflowDefaults": yaml.safe_load(settings(limit="1")["workflowDefaults"])})},
            "warning",
            "tried again 1 times",
        ),
    ],
)
def test_what_the_controllers_settings_make_of_retries(data: dict[str, str], level: Level, found: str):
    finding = retries(data)
    assert finding.level == level
    assert found in finding.what
    assert ("limit: '0'" in finding.hint) == (level == "warning")


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, object]]:
    """A Kubernetes API that has the ConfigMap in `kubeflow`, unless it is told to refuse."""
    answer: dict[str, object] = {"status": 200, "data": settings(limit="2", retryPolicy="OnError")}

    class Handler(http.Handler):
        def do_GET(self) -> None:
            found = self.path == f"/api/v1/namespaces/kubeflow/configmaps/{CONTROLLER}"
            body = json.dumps({"kind": "ConfigMap", "data": answer["data"]}).encode()
            self.send_response(int(str(answer["status"])) if found else 404)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    with http.Server(Handler) as server:
        file = tmp_path / "kubeconfig"
        file.write_text(kubeconfig(server.url), encoding="utf-8")
        monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(file))
        monkeypatch.setattr("kubernetes.config.KUBE_CONFIG_DEFAULT_LOCATION", str(file))
        yield answer


def test_the_cluster_is_asked(cluster: dict[str, object]):
    finding = check_retries("kubeflow")
    assert "NOT tried again" in finding.what
    finding = check_retries("elsewhere")
    assert (finding.level, finding.what) == ("warning", f"there is no ConfigMap {CONTROLLER} in namespace elsewhere")
    assert "--namespace" in finding.hint
    cluster["status"] = 403
    finding = check_retries("kubeflow")
    assert finding.level == "warning"
    assert "may not be read (HTTP 403)" in finding.what
    assert "ask an administrator" in finding.hint


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (None, "this machine knows none"),
        ("{}", "this machine knows none"),
        ("[1, 2", "the kubeconfig cannot be read"),
        ("just text", "the kubeconfig cannot be read"),
        (kubeconfig("http://127.0.0.1:9"), "cannot be reached: Connection refused"),
        (kubeconfig("http://no-such-host.invalid"), "cannot be reached: "),
    ],
)
def test_without_a_cluster_one_finding_says_what_to_do(
    content: str | None, found: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    """Commit 9e44b4e: a note of the package kubernetes, and no finding."""
    file = tmp_path / "kubeconfig"
    if content is not None:
        file.write_text(content, encoding="utf-8")
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(file))
    monkeypatch.setattr("kubernetes.config.KUBE_CONFIG_DEFAULT_LOCATION", str(file))
    finding = check_retries("kubeflow")
    assert finding.level == "error"
    assert found in finding.what
    assert "kubectl" in finding.hint
    assert capfd.readouterr() == ("", "")


def test_the_command_says_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    from skd_lib.preflight import cluster as doctor_kubeflow

    monkeypatch.setattr("skd_lib.preflight.machine.examine", lambda *_: [])
    monkeypatch.setattr(doctor_kubeflow, "read_controller", lambda _: settings(limit="2", retryPolicy="OnError"))
    done = CliRunner().invoke(app, ["doctor", "--kubeflow"])
    assert done.exit_code == 0, done.output
    assert "retries" in done.output
    assert "retries" not in CliRunner().invoke(app, ["doctor"]).output
