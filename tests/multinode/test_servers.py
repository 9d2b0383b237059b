"""vLLM servers in pods of their own, against a server that speaks Kubernetes' REST API; processes are containers."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from kubernetes.client import ApiClient

from skd_lib._core.machine import ENGINE_IMAGE_VARIABLE
from skd_lib.config import DistillConfig, EnginePodsConfig, parse_section
from skd_lib.errors import Preempted, SkdError, SkdErrors
from skd_lib.multinode import servers as module
from skd_lib.multinode.cleanup import delete_abandoned_servers
from skd_lib.multinode.manifest import server_pods, server_secret
from skd_lib.multinode.servers import check_servers, servers
from skd_lib.preflight.checks import Checks
from skd_lib.preflight.environment import check_engine
from skd_lib.vllm.guard import TOKEN_VARIABLE
from skd_lib.vllm.serve import Served
from tests.multinode.fake_kubernetes import STEP_POD, FakeKubernetes, running
from tests.multinode.kubelet import Kubelet


@pytest.fixture
def kubernetes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeKubernetes]:
    with running() as server:
        monkeypatch.setenv("KUBECONFIG", str(server.kubeconfig(tmp_path)))
        monkeypatch.setenv("KFP_RUN_ID", "run-1")
        monkeypatch.setenv("KFP_POD_NAME", "step-pod")
        monkeypatch.setenv(ENGINE_IMAGE_VARIABLE, "registry/skd-vllm@sha256:0")
        monkeypatch.setenv(TOKEN_VARIABLE, "")  # restored after the test
        monkeypatch.delenv(TOKEN_VARIABLE)
        monkeypatch.setattr(module, "POLL_SECONDS", 0.05)
        yield server


@pytest.fixture
def kubelet(kubernetes: FakeKubernetes, tmp_path: Path) -> Iterator[Kubelet]:
    node = Kubelet(kubernetes, tmp_path / "node")
    kubernetes.on_pod = node.on_pod
    yield node
    node.close()


@pytest.fixture
def models(tmp_path: Path) -> Served:
    for name in ("teacher", "student"):
        (tmp_path / name / "more").mkdir(parents=True)
        (tmp_path / name / "config.json").write_text(f"the {name}'s")
        (tmp_path / name / "more" / "model.safetensors").write_bytes(b"w" * 100_000)
    return Served(tmp_path / "teacher", tmp_path / "student", 3, max_model_len=50, max_rows=7)


ENGINES = ("transformers", "vllm")


def pods_of(kubernetes: FakeKubernetes) -> dict[str, dict[str, Any]]:
    return {name: pod for name, pod in kubernetes.pods.items() if name.startswith("skd-engine-")}


@pytest.mark.slow
def test_servers_get_the_models_answer_start_again_and_go(
    kubernetes: FakeKubernetes, kubelet: Kubelet, models: Served, tmp_path: Path
) -> None:
    found: dict[str, bool] = {}

    def find() -> None:
        with servers(EnginePodsConfig(count=2), 60, models, main=False) as theirs:
            found.update({engine.url: engine.answers() for engine in theirs})

    other = threading.Thread(target=find, daemon=True)
    other.start()
    with servers(EnginePodsConfig(count=2), 60, models) as engines:
        token = os.environ[TOKEN_VARIABLE]
        assert all(engine.answers() for engine in engines)
        assert len({engine.url for engine in engines}) == 2
        made = pods_of(kubernetes)
        (secret,) = kubernetes.secrets.values()
        assert secret["stringData"] == {"token": token}
        for name, pod in made.items():
            assert token not in json.dumps(pod)
            assert pod["metadata"]["ownerReferences"][0]["uid"] == STEP_POD["metadata"]["uid"]
            kept = kubelet.folder / name / "skd-models"
            for kind in ("teacher", "student"):
                sent = {path.relative_to(kept / kind): path for path in (kept / kind).rglob("*") if path.is_file()}
                assert {str(path) for path in sent} == {"config.json", "more/model.safetensors"}
                assert (kept / kind / "config.json").read_text() == f"the {kind}'s"
            said = kubelet.log(name)
            assert str(kept / "teacher") in said
            assert '"num_speculative_tokens\\": 3' in said.replace('\\\\"', '\\"')
            assert ('"--max-num-seqs", "7"') in said
            assert token not in said
        # Another process of the step's pod finds them, too, and waits for them.
        other.join(20)
        assert found == {engine.url: True for engine in engines}
        # A container that ends starts again with what it has.
        name, pod = next(iter(made.items()))
        kubelet.kill(name)
        assert not engines[0].answers()
        kubelet.start(pod, restarts=1)
        engines[0].wait()
        assert kubelet.log(name).count("waiting for the models") == 1
    assert pods_of(kubernetes) == kubernetes.secrets == kubelet.processes == {}


@pytest.mark.parametrize("settings", [{}, {"resources": {"cpu": "4", "memory": "8Gi"}, "count": 3}])
def test_a_servers_pod_has_the_steps_place_and_none_of_its_rights(settings: dict[str, Any]) -> None:
    made = server_pods(STEP_POD, EnginePodsConfig(**settings), run_id="run", image="image", gpus=4)
    secret = server_secret(STEP_POD, "run", "t0ken")
    api = ApiClient()
    for manifest, model in ((made[0], "V1Pod"), (secret, "V1Secret")):
        read = api.deserialize(SimpleNamespace(data=json.dumps(manifest)), model)
        assert api.sanitize_for_serialization(read) == manifest  # an unknown field would be lost on the way
    assert len(made) == settings.get("count", 1)
    spec = made[0]["spec"]
    (container,) = spec["containers"]
    step = STEP_POD["spec"]
    assert container["image"] == "image"
    assert "args" not in container
    assert (spec["nodeSelector"], spec["tolerations"]) == (step["nodeSelector"], step["tolerations"][:1])
    limits = {"memory": "64Gi", "nvidia.com/gpu": "4"} if not settings else {"memory": "8Gi"}
    assert container["resources"]["limits"] == limits
    assert {tuple(volume.keys() - {"name"}) for volume in spec["volumes"]} == {("emptyDir",)}
    assert spec["automountServiceAccountToken"] is spec["enableServiceLinks"] is False
    assert {each["name"]: list(each["valueFrom"]) for each in container["env"]} == {
        TOKEN_VARIABLE: ["secretKeyRef"],
        "SKD_ENGINE_ADDRESS": ["fieldRef"],
    }
    # https://kubernetes.io/docs/concepts/security/pod-security-standards/#restricted
    assert spec["securityContext"] == {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}
    context = container["securityContext"]
    assert (context["allowPrivilegeEscalation"], context["capabilities"]) == (False, {"drop": ["ALL"]})
    assert context["readOnlyRootFilesystem"] is True


def stays(**status: Any) -> Callable[[dict[str, Any]], None]:
    """A kubelet that does not start a pod."""

    def on_pod(pod: dict[str, Any]) -> None:
        if "status" in pod:
            pod["status"] |= {"phase": "Pending", **status}

    return on_pod


UNSCHEDULABLE = {
    "conditions": [
        {
            "type": "PodScheduled",
            "status": "False",
            "reason": "Unschedulable",
            "message": "0/3 nodes are available: 3 Insufficient nvidia.com/gpu.",
        }
    ]
}
UNPULLED = {
    "containerStatuses": [{"state": {"waiting": {"reason": "ImagePullBackOff", "message": "Back-off pulling image"}}}]
}


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (UNSCHEDULABLE, r"does not start: Unschedulable: 0/3 nodes(.|\n)*hint: .*pods\.resources(.|\n)*wait_minutes"),
        (UNPULLED, r"does not start: ImagePullBackOff(.|\n)*hint: .*pods\.image"),
        ({}, "does not start: Pending"),
        ({"phase": "Failed", "reason": "Evicted", "message": "low on memory"}, "has ended: Evicted: low on memory"),
    ],
)
def test_a_pod_that_does_not_start_is_said_why_and_deleted(
    kubernetes: FakeKubernetes, models: Served, status: dict[str, Any], message: str, caplog: pytest.LogCaptureFixture
) -> None:
    kubernetes.on_pod = stays(**status)
    with pytest.raises(SkdError, match=message), servers(EnginePodsConfig(), 0.003, models):
        raise AssertionError
    assert pods_of(kubernetes) == kubernetes.secrets == {}


@pytest.mark.slow
def test_a_vllm_that_ends_at_once_is_an_error_with_its_log(
    kubernetes: FakeKubernetes, kubelet: Kubelet, models: Served, capsys: pytest.CaptureFixture[str]
) -> None:
    kubelet.variables["BROKEN"] = "1"

    def on_pod(pod: dict[str, Any]) -> None:
        kubelet.on_pod(pod)
        if "status" in pod:
            threading.Thread(target=restart, args=(pod,), daemon=True).start()

    def restart(pod: dict[str, Any]) -> None:
        name = pod["metadata"]["name"]
        kubelet.processes[name].wait()
        kubernetes.logs[f"{name} before"] = [f"2026-01-01T00:00:00Z {line}" for line in kubelet.log(name).splitlines()]
        state = {"terminated": {"exitCode": 1, "reason": "Error"}}
        pod["status"]["containerStatuses"] = [
            {"state": {"waiting": {"reason": "CrashLoopBackOff"}}, "lastState": state, "restartCount": 1}
        ]

    kubernetes.on_pod = on_pod
    with (
        pytest.raises(SkdError, match="vLLM ended before it answered: ValueError: no memory"),
        servers(EnginePodsConfig(), 60, models),
    ):
        raise AssertionError
    assert "ValueError: no memory" in capsys.readouterr().out
    assert pods_of(kubernetes) == kubernetes.secrets == {}


@pytest.mark.slow
def test_a_server_that_is_lost_in_mid_training_is_said_at_once(
    kubernetes: FakeKubernetes, kubelet: Kubelet, models: Served
) -> None:
    with servers(EnginePodsConfig(), 60, models) as (engine,):
        (name,) = pods_of(kubernetes)
        kubelet.end(name)
        kubernetes.pods[name]["status"] = {"phase": "Failed", "reason": "Evicted"}
        with pytest.raises(SkdError, match=r"has ended: Evicted(.|\n)*retry the step"):
            engine.wait()
        kubernetes.pods.pop(name)
        with pytest.raises(SkdError, match="has been deleted"):
            engine.wait()


def test_a_retry_deletes_what_a_killed_attempt_has_left_and_nothing_else(
    kubernetes: FakeKubernetes, models: Served
) -> None:
    for step, phase in (("killed-pod", "Failed"), ("other-pod", "Running")):
        pod = {"metadata": {"name": step, "uid": step}, "spec": STEP_POD["spec"], "status": {"phase": phase}}
        kubernetes.pods[step] = pod
        (server,) = server_pods(pod, EnginePodsConfig(), run_id="run-1", image="i", gpus=1)
        kubernetes.pods[step.replace("pod", "server")] = server
        server["metadata"]["name"] = step.replace("pod", "server")
    kubernetes.on_pod = stays(**UNSCHEDULABLE)
    with pytest.raises(SkdError), servers(EnginePodsConfig(), 0.001, models):
        raise AssertionError
    assert kubernetes.pods.keys() & {"killed-server", "other-server"} == {"other-server"}
    # All steps have ended when `finish` looks, whatever their pods say.
    assert delete_abandoned_servers("run-2") == []
    assert delete_abandoned_servers("run-1") == ["other-server"]
    kubernetes.refused["GET"] = [403]
    assert delete_abandoned_servers("run-1") == []


def test_sigterm_while_they_start_deletes_them(kubernetes: FakeKubernetes, models: Served) -> None:
    def on_pod(pod: dict[str, Any]) -> None:
        if "status" in pod:
            threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()

    kubernetes.on_pod = on_pod
    with pytest.raises(Preempted), servers(EnginePodsConfig(), 0.2, models):
        raise AssertionError
    assert pods_of(kubernetes) == kubernetes.secrets == {}


def test_missing_rights_are_named(kubernetes: FakeKubernetes, models: Served) -> None:
    kubernetes.refused["POST"] = [403]
    with (
        pytest.raises(SkdError, match=r"not allowed(.|\n)*pipelines/deploy/engine"),
        servers(EnginePodsConfig(), 60, models),
    ):
        raise AssertionError
    assert pods_of(kubernetes) == {}


def test_preflight_has_kubernetes_check_and_makes_nothing(
    kubernetes: FakeKubernetes, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_servers(EnginePodsConfig(), gpus=1)
    assert (pods_of(kubernetes), kubernetes.secrets) == ({}, {})
    assert [request.split()[0] for request in kubernetes.requests] == ["POST", "POST", "GET"]
    kubernetes.refused["POST"] = [403]
    with pytest.raises(SkdError, match="pipelines/deploy/engine"):
        check_servers(EnginePodsConfig(), gpus=1)
    runs: Any = [SimpleNamespace(distill=DistillConfig(engine=engine, vllm={"pods": {}})) for engine in ENGINES]
    checks = Checks()
    check_engine(checks, runs[:1])
    assert checks.found == []
    check_engine(checks, runs)
    assert [(check.level, "1 of registry/skd-vllm@" in check.what) for check in checks.found] == [("ok", True)]
    monkeypatch.delenv(ENGINE_IMAGE_VARIABLE)
    with pytest.raises(SkdError, match=r"pods\.image: no image is named"):
        check_servers(EnginePodsConfig(), gpus=1)
    check_servers(EnginePodsConfig(image="mine"), gpus=1)
    monkeypatch.delenv("KUBECONFIG")
    with pytest.raises(SkdError, match=r"distill\.vllm\.pods: this needs a Kubernetes cluster"):
        check_servers(EnginePodsConfig(image="mine"), gpus=1)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"vllm": {"pods": {}, "urls": ["http://a:1"]}}, "pods: the step makes servers of its own"),
        ({"vllm": {"pods": {"resources": {"nvidia.com/gpu": "4"}}}}, "4 GPUs in each pod(.|\n)*tensor_parallel: 1"),
        ({"vllm": {"pods": {"count": 0}}}, "greater than or equal to 1"),
        ({"engine": "vllm", "vllm": {"pods": {}}, "multinode": {"nodes": 2}}, "multinode"),
    ],
)
def test_what_cannot_work_is_refused_at_once(values: dict[str, Any], message: str) -> None:
    with pytest.raises(SkdErrors, match=message):
        parse_section(DistillConfig, values, where="config")
