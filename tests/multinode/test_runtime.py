"""The TrainingRuntime of the project, and the exit codes by which Kubernetes tells whether starting again helps."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import kubernetes.client
import pytest
import yaml
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from skd_lib.config import MultinodeConfig
from skd_lib.errors import Preempted, SkdError, Transient
from skd_lib.multinode import launch, node
from skd_lib.multinode.exchange import Exchange, Request
from skd_lib.multinode.manifest import NODE
from tests.multinode.jobset import Nodes

TORCH_DISTRIBUTED: dict[str, Any] = {
    "spec": {"template": {"spec": {"replicatedJobs": [{"template": {"spec": {"template": {"spec": {}}}}}]}}}
}
"""The part of Trainer's own runtime that matters here (2.1.0 to 2.3.0): it says nothing of failures."""
FILE = Path(__file__).parents[2] / "pipelines/deploy/multinode/runtime.yaml"


@pytest.fixture(scope="module")
def runtime() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(FILE.read_text(encoding="utf-8"))
    return found


def test_the_default_runtime_is_the_projects_own(runtime: dict[str, Any]) -> None:
    settings = MultinodeConfig(nodes=2)
    assert (settings.runtime_kind, settings.runtime) == (runtime["kind"], runtime["metadata"]["name"])
    assert runtime["spec"]["mlPolicy"] == {"numNodes": 1, "torch": {}}


def test_all_nodes_start_again_together_but_for_what_they_refuse(runtime: dict[str, Any]) -> None:
    """JobSet 0.10 to 0.12: a failed Job restarts all, `maxRestarts` times; the first rule that matches goes before."""
    jobs = runtime["spec"]["template"]["spec"]
    assert "ttlSecondsAfterFinished" not in jobs  # Trainer would start a failed job again for ever
    assert jobs["failurePolicy"]["maxRestarts"] == 10
    (rule,) = jobs["failurePolicy"]["rules"]
    assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
    (replicated,) = jobs["replicatedJobs"]
    assert replicated["name"] == NODE
    assert replicated["template"]["metadata"]["labels"] == {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}
    job = replicated["template"]["spec"]
    assert job["backoffLimit"] == 0  # else the Job replaces single pods, so many times for all nodes together
    (refused,) = job["podFailurePolicy"]["rules"]
    assert refused["action"] == "FailJob"
    assert refused["onExitCodes"] == {"containerName": NODE, "operator": "In", "values": [SkdError.exit_code]}
    assert SkdError.exit_code not in (Preempted.exit_code, Transient.exit_code)
    assert job["template"]["spec"]["restartPolicy"] == "Never"  # `podFailurePolicy` wants it
    (container,) = job["template"]["spec"]["containers"]
    assert (container["name"], container["terminationMessagePolicy"]) == (NODE, "FallbackToLogsOnError")


@pytest.mark.parametrize("nodes", [2, 8, 1000])
def test_ten_failures_are_survived_whatever_the_number_of_nodes(runtime: dict[str, Any], nodes: int) -> None:
    job = Nodes(runtime, nodes)
    everybody = [137, *[70] * (nodes - 1)]
    assert [job.fail(codes) for codes in [everybody, [1]] * 5] == [""] * 10
    assert job.fail([1]) == "ReachedMaxRestarts"
    # By Trainer's own runtime: six restarts of containers, and each failure is one of every node.
    survived = {2: 2, 8: 0, 1000: 0}[nodes]
    job = Nodes(TORCH_DISTRIBUTED, nodes)
    assert [job.fail([1]) for _ in range(survived + 1)] == [*[""] * survived, "FailedJobs"]


def test_what_a_node_refuses_is_not_repeated(runtime: dict[str, Any]) -> None:
    assert Nodes(runtime, 2).fail([70, SkdError.exit_code]) == "FailJobSetFailurePolicyAction"
    assert Nodes(runtime, 2).fail([Preempted.exit_code, 143]) == ""
    assert Nodes(TORCH_DISTRIBUTED, 2).fail([SkdError.exit_code]) == ""


def test_what_may_pass_by_itself_is_tried_again(runtime: dict[str, Any]) -> None:
    job = Nodes(runtime, 2)
    assert [job.fail([Transient.exit_code, 70]) for _ in range(10)] == [""] * 10
    assert job.fail([Transient.exit_code]) == "ReachedMaxRestarts"


def test_its_job_is_one_that_kubernetes_knows(runtime: dict[str, Any]) -> None:
    job = runtime["spec"]["template"]["spec"]["replicatedJobs"][0]["template"]["spec"]
    api = kubernetes.client.ApiClient()
    model = api.deserialize(SimpleNamespace(data=json.dumps(job)), "V1JobSpec")
    assert api.sanitize_for_serialization(model) == job  # an unknown field would be lost on the way


@pytest.mark.parametrize(
    ("codes", "told"),
    [([2], 2), ([70, 2], 2), ([70, 1], 70), ([-9, 70], 137), ([75, 1], 75), ([75, 2], 2)],
)
def test_the_exit_code_says_how_the_processes_ended(
    monkeypatch: pytest.MonkeyPatch, codes: list[int], told: int
) -> None:
    def fails(_: list[str]) -> None:
        failures = {}
        for rank, code in reversed(list(enumerate(codes))):
            failures[rank] = ProcessFailure(local_rank=rank, pid=1, exitcode=code, error_file="")
            failures[rank].timestamp = rank
        raise ChildFailedError("step", failures)

    monkeypatch.setattr(launch.run, "main", fails)
    assert launch.main(["-m", "step"]) == told
    monkeypatch.setattr(launch.run, "main", lambda _: None)
    assert launch.main(["-m", "step"]) == 0


def test_torchrun_tells_what_its_processes_refuse(tmp_path: Path) -> None:
    script = tmp_path / "step.py"
    script.write_text("import os, sys, time\nif os.environ['RANK'] == '1': sys.exit(2)\ntime.sleep(60)\n")
    done = subprocess.run(
        [sys.executable, "-m", "skd_lib.multinode.launch", "--standalone", "--nproc-per-node", "2", str(script)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == SkdError.exit_code, done.stderr


@pytest.fixture
def run_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Runs a node whose processes end with a code."""
    exchange = Exchange(f"memory://bucket/{tmp_path.name}")
    exchange.write(Request(step="distill", options={}, inputs={}, outputs={}, artifacts={}))
    popen = subprocess.Popen

    def run(code: int) -> None:
        words = [sys.executable, "-S", "-c", f"import sys; sys.exit({code})"]
        monkeypatch.setattr(node.subprocess, "Popen", lambda _, **options: popen(words, **options))
        with pytest.raises(SystemExit) as caught:
            node.main(exchange.uri)
        assert caught.value.code == code

    return run


def test_a_node_that_lost_another_one_is_not_the_first_to_end(
    run_node: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    monkeypatch.setattr(node.Child, "wait_for_signal", lambda _, seconds: waits.append(seconds))
    run_node(SkdError.exit_code)
    assert waits == []
    run_node(70)
    assert waits == [node.LAST_SECONDS]


def test_a_waiting_node_ends_at_sigterm(run_node: Callable[[int], None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node, "LAST_SECONDS", 60)
    wait = node.Child.wait_for_signal

    def terminated(self: Any, seconds: float) -> None:
        signal.raise_signal(signal.SIGTERM)
        wait(self, seconds)

    monkeypatch.setattr(node.Child, "wait_for_signal", terminated)
    with pytest.raises(Preempted):
        run_node(70)
