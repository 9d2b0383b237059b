"""The step `distill` with vLLM servers in pods: its real command, real servers, and a stand-in for Kubernetes' API."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from skd_lib.config import DataConfig
from skd_lib.data.prepared import prepare
from skd_lib.errors import Preempted, SkdError
from skd_lib.models.records import read_record
from skd_lib.multinode.manifest import STEP_ANNOTATION
from skd_lib.vllm.serve import environment
from tests.multinode.fake_kubernetes import STEP_POD, FakeKubernetes, running
from tests.multinode.kubelet import Kubelet
from tests.vllm.conftest import GAMMA, Pair

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(900)]

TRAINING = {
    "max_steps": 3,
    "eval_steps": 1,
    "batch_size": 4,
    "micro_batch_size": 2,
    "dropout": 0,
    "learning_rate": 5e-3,
}
ROW = '"POST /inference/v1/generate HTTP/1.1" 200'
TASK = {"prompt": "translate: {source}", "max_prompt_tokens": 60, "max_new_tokens": 12}


@dataclass
class Step:
    """The step's command and the cluster that it is in."""

    folder: Path
    models: dict[str, Path]
    kubernetes: FakeKubernetes
    kubelet: Kubelet

    def start(self, attempt: str, **distill: Any) -> subprocess.Popen[str]:
        """Begin an attempt, in a pod of that name; without settings for vLLM it samples itself."""
        pod = {**STEP_POD, "metadata": {**STEP_POD["metadata"], "name": attempt, "uid": attempt}}
        self.kubernetes.pods[attempt] = pod | {"status": {"phase": "Running"}}
        sampling = {"top_k": 60, "adaptive_gamma": False, "gamma": GAMMA}
        settings = {"sampling": sampling, "training": {**TRAINING, "precision": "fp32"}, **distill}
        options = {
            **{name: str(folder) for name, folder in self.models.items()},
            "data": str(self.folder / "data"),
            "student-out": str(self.folder / attempt),
            "config": json.dumps({"distill": settings, "task": TASK, "seed": 3}),
            "checkpoint-root": str(self.folder / f"checkpoints-{settings.get('engine', '')}"),
        }
        variables = {"KUBECONFIG": str(self.kubernetes.kubeconfig(self.folder)), "KFP_RUN_ID": "run-1"}
        with (self.folder / f"{attempt}.log").open("w") as log:
            return subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "skd_lib.steps.distill",
                    *(f"--{name}={value}" for name, value in options.items()),
                ],
                env={**os.environ, **variables, "KFP_POD_NAME": attempt, "OMP_NUM_THREADS": "1"},
                stdout=log,
                stderr=log,
                text=True,
            )

    def in_pods(self, attempt: str) -> subprocess.Popen[str]:
        """Begin an attempt with one server."""
        return self.start(attempt, engine="vllm", vllm={"pods": {"image": "vllm"}, "wait_minutes": 10})

    def said(self, attempt: str) -> str:
        return (self.folder / f"{attempt}.log").read_text()

    def wait_for(self, attempt: str, process: subprocess.Popen[str], said: str, times: int = 1) -> dict[str, Any]:
        """Wait until an attempt's server has said something; return its pod."""
        deadline = time.monotonic() + 400
        while time.monotonic() < deadline:
            for name in self.servers():
                pod = self.kubernetes.pods[name]
                is_its = pod["metadata"]["annotations"][STEP_ANNOTATION] == attempt
                if is_its and self.kubelet.log(name).count(said) >= times:
                    return pod
            assert process.poll() is None
            time.sleep(0.02)
        raise AssertionError

    def servers(self) -> list[str]:
        return [name for name in self.kubernetes.pods if name.startswith("skd-engine-")]

    def is_clean(self) -> bool:
        """Nothing is left in the cluster, and no server of it runs."""
        return self.servers() == [] and self.kubernetes.secrets == self.kubelet.processes == {}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    rows = [{"source": f"le fichier {n} du compte {n * 7}", "target": f"the file {n}"} for n in range(40)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"type": "files", "train": [str(folder / "rows.jsonl")]}
    settings = {"source": source, "near_duplicate_threshold": 1, "student_examples": 20, "validation_examples": 4}
    prepare(DataConfig.model_validate(settings), folder / "data", seed=0)
    return folder / "data"


@pytest.fixture
def step(pair: Pair, data: Path, tmp_path: Path) -> Iterator[Step]:
    # vLLM's sockets are in the pod's folder, and their paths must be short.
    with running() as kubernetes, tempfile.TemporaryDirectory() as disk:
        kubelet = Kubelet(kubernetes, Path(disk), environment())
        kubernetes.on_pod = kubelet.on_pod
        (tmp_path / "data").symlink_to(data)
        yield Step(tmp_path, pair.folders, kubernetes, kubelet)
        kubelet.close()


def test_a_server_that_dies_in_mid_step_comes_back_and_the_losses_are_the_own_engines(step: Step) -> None:
    own = step.start("own")
    assert own.wait(300) == 0, step.said("own")
    process = step.in_pods("first")
    pod = step.wait_for("first", process, ROW, 6)
    step.kubelet.kill(pod["metadata"]["name"])
    step.kubelet.start(pod, restarts=1)
    assert process.wait(400) == 0, step.said("first")
    assert "answers again" in step.said("first")
    want, got = (read_record(step.folder / name) for name in ("own", "first"))
    for curve in ("training_loss", "validation_loss", "rejection_rate"):
        assert len(getattr(want.course, curve)) >= 3
        assert getattr(got.course, curve) == pytest.approx(getattr(want.course, curve), rel=1e-3, abs=1e-4), curve
    assert 0.1 < min(got.course.rejection_rate) < 0.9
    tokens = [[[(token.text, token.by) for token in row.tokens] for row in each.samples()] for each in (got, want)]
    assert tokens[0] == tokens[1] != []
    assert step.is_clean()


def test_sigterm_in_mid_training_saves_and_deletes_what_was_made(step: Step) -> None:
    process = step.in_pods("first")
    step.wait_for("first", process, ROW, 8)
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) == Preempted.exit_code, step.said("first")
    assert "stopped by SIGTERM after optimiser step" in step.said("first")
    assert step.is_clean()


def test_a_killed_steps_servers_go_with_the_next_attempt_and_a_lost_pod_is_an_error(step: Step) -> None:
    process = step.in_pods("first")
    step.wait_for("first", process, "starting vLLM")
    process.kill()
    process.wait()
    assert not step.is_clean()
    step.kubernetes.pods["first"]["status"]["phase"] = "Failed"
    again = step.in_pods("second")
    pod = step.wait_for("second", again, ROW)
    assert len(step.servers()) == 1
    step.kubelet.kill(pod["metadata"]["name"])
    pod["status"] = {"phase": "Failed", "reason": "Evicted", "message": "low on memory"}
    assert again.wait(120) == SkdError.exit_code, step.said("second")
    assert "has ended: Evicted: low on memory" in step.said("second")
    assert step.is_clean()
