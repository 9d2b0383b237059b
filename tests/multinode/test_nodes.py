"""Processes, signals and torchrun for real: the step's command, and the nodes that its manifest asks for."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import pytest
import torch
from safetensors.torch import load_file

from skd_lib import storage
from skd_lib.config import DataConfig
from skd_lib.data.prepared import prepare
from skd_lib.errors import Preempted
from skd_lib.models.files import weights_digest
from skd_lib.models.records import read_record, write_record
from skd_lib.steps.kfp_call import Call
from tests.multinode.fake_kubernetes import FakeKubernetes, running
from tests.support.gcs_emulator import emulated

BUCKET = "gs://multinode"
TASK = {"prompt": "translate: {source}", "max_prompt_tokens": 128, "max_new_tokens": 12}


class Save(Protocol):
    def __call__(self, folder: Path, arch: str = "llama", seed: int = 0, **options: Any) -> Path: ...


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory, save_tiny_model: Save) -> Iterator[str]:
    """Object storage with what earlier steps left there."""
    folder = tmp_path_factory.mktemp("inputs")
    rows = [{"source": f"le fichier {n} du compte {n * 7}", "target": f"the file {n}"} for n in range(40)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"type": "files", "train": [str(folder / "rows.jsonl")]}
    settings = {"source": source, "near_duplicate_threshold": 1, "student_examples": 20, "validation_examples": 6}
    prepare(DataConfig.model_validate(settings), folder / "data", seed=0)
    for seed, name in enumerate(("student", "teacher"), start=1):
        save_tiny_model(folder / name, seed=seed)
        write_record(folder / name, lineage={"reference": f"org/{name}"})
    with emulated("multinode"):
        for name in ("data", "student", "teacher"):
            storage.upload(folder / name, f"{BUCKET}/in/{name}")
        yield BUCKET


@pytest.fixture
def kubernetes() -> Iterator[FakeKubernetes]:
    with running() as server:
        yield server


class Nodes:
    """A kubelet that runs a job's nodes as processes, with the variables that Trainer's torch runtime sets."""

    def __init__(self, kubernetes: FakeKubernetes, folder: Path) -> None:
        self.kubernetes, self.folder = kubernetes, folder
        self.rounds: list[list[subprocess.Popen[str]]] = []
        kubernetes.on_create = self.start
        kubernetes.on_stop = self.stop

    def start(self, job: dict[str, Any]) -> None:
        trainer, name = job["spec"]["trainer"], job["metadata"]["name"]
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        nodes = []
        for rank in range(trainer["numNodes"]):
            scratch = self.folder / f"{len(self.rounds)}-{rank}"  # of its own: nothing is shared but object storage
            scratch.mkdir(parents=True)
            environment = {
                **os.environ,
                **{each["name"]: each["value"] for each in trainer["env"] if "value" in each},
                "TMPDIR": str(scratch),
                "PET_NNODES": str(trainer["numNodes"]),
                "PET_NPROC_PER_NODE": str(trainer["numProcPerNode"]),
                "PET_NODE_RANK": str(rank),
                "PET_MASTER_ADDR": "localhost",
                "PET_MASTER_PORT": str(port),
            }
            command = [sys.executable, *trainer["command"][1:], *trainer["args"]]
            process = subprocess.Popen(
                command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
            nodes.append(process)
            pod = self.kubernetes.add_node(name, rank, suffix=str(len(self.rounds)))
            threading.Thread(target=self._read, args=(process, pod), daemon=True).start()
        self.rounds.append(nodes)
        threading.Thread(target=self._end, args=(nodes, name), daemon=True).start()

    def stop(self, _: dict[str, Any]) -> None:
        for process in self.rounds[-1]:
            process.terminate()
        for process in self.rounds[-1]:
            process.wait()

    def lines(self, rank: int = 0) -> str:
        return "\n".join(line for pod, lines in self.kubernetes.logs.items() if f"-0-{rank}-" in pod for line in lines)

    def _read(self, process: subprocess.Popen[str], pod: str) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            self.kubernetes.write(pod, line.rstrip("\n"))

    def _end(self, nodes: list[subprocess.Popen[str]], job: str) -> None:
        codes = [process.wait() for process in nodes]
        time.sleep(0.2)  # until the logs are read
        if job in self.kubernetes.jobs:
            kind = "Failed" if any(codes) else "Complete"
            self.kubernetes.end(job, kind, f"the nodes ended with {codes}", "Ended")


def step_process(folder: Path, kubernetes: FakeKubernetes, **config: Any) -> subprocess.Popen[str]:
    """The command that the component `distill` runs in its container."""
    fetched = folder / "fetched"  # by the launcher, into a pod that does not train
    fetched.mkdir(parents=True, exist_ok=True)
    (fetched / "file").write_text("whole")
    call = Call(
        output_file=folder / "output.json",
        artifacts={"distilled_student": f"{BUCKET}/out/distilled_student"},
        inputs={name: f"{BUCKET}/in/{name}" for name in ("student", "teacher", "data")},
    )
    training = {"learning_rate": 5e-3, "batch_size": 4, "micro_batch_size": 1, "dropout": 0, **config.pop("training")}
    section = {"sampling": {"top_k": 3, "adaptive_gamma": False}, "multinode": {"nodes": 2}, **config}
    options = {
        **dict.fromkeys(call.inputs, str(fetched)),
        "student_out": str(folder / "student"),
        "config": json.dumps({"distill": {**section, "training": training}, "task": TASK, "seed": 3}),
    }
    return started("distill", options, call, folder, kubernetes)


def started(
    step: str, options: dict[str, str], call: Call, folder: Path, kubernetes: FakeKubernetes
) -> subprocess.Popen[str]:
    """A step's process, as in its pod."""
    options = {**options, "checkpoint_root": f"{BUCKET}/checkpoints"}
    words = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", value)]
    words += call.words()
    environment = {"KUBECONFIG": str(kubernetes.kubeconfig(folder)), "KFP_RUN_ID": "run-1", "KFP_POD_NAME": "step-pod"}
    return subprocess.Popen(
        [sys.executable, "-m", f"skd_lib.steps.{step}", *words],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for(what: Callable[[], Any], seconds: float = 240.0) -> None:
    limit = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < limit
        time.sleep(0.05)


@pytest.fixture(autouse=True)
def _one_process_a_node(monkeypatch: pytest.MonkeyPatch) -> None:
    """The step's pod of the tests has no GPUs."""
    from tests.multinode import fake_kubernetes

    container = fake_kubernetes.STEP_POD["spec"]["containers"][1]
    monkeypatch.setitem(container, "resources", {"limits": {"memory": "8Gi"}})


def test_sigterm_deletes_the_job(bucket: str, kubernetes: FakeKubernetes, tmp_path: Path) -> None:
    process = step_process(tmp_path, kubernetes, training={"max_steps": 2})
    wait_for(lambda: kubernetes.jobs or process.poll() is not None)
    (name,) = kubernetes.jobs
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == Preempted.exit_code, output
    assert kubernetes.jobs == {}
    assert f"stopped by SIGTERM; the TrainJob {name} is deleted" in output
    assert not (tmp_path / "output.json").exists()
    # An API that is away: told, with the command that deletes the job by hand.
    process = step_process(tmp_path, kubernetes, training={"max_steps": 2})
    wait_for(lambda: kubernetes.jobs or process.poll() is not None)
    kubernetes.refused["DELETE"] = [403]
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == Preempted.exit_code
    assert f"could not be deleted and goes on; `kubectl delete trainjob {name} -n team`" in output


@pytest.mark.slow
def test_two_nodes_train_are_terminated_and_go_on(bucket: str, kubernetes: FakeKubernetes, tmp_path: Path) -> None:
    """Nodes share object storage and nothing else; the first attempt is terminated, the second goes on from there."""
    storage.delete(f"{BUCKET}/checkpoints")  # requests that other tests never took back
    Nodes(kubernetes, tmp_path / "nodes")
    training = {"max_steps": 24, "eval_steps": 4, "fsdp": True}
    first = step_process(tmp_path / "first", kubernetes, training=training)
    checkpoints = f"{BUCKET}/checkpoints/distill"
    wait_for(
        lambda: any(name.endswith("/complete") for name in storage.file_sizes(checkpoints)) or first.poll() is not None
    )
    first.send_signal(signal.SIGTERM)
    output, _ = first.communicate(timeout=200)
    assert first.returncode == Preempted.exit_code, output
    second = step_process(tmp_path / "second", kubernetes, training=training)
    output, _ = second.communicate(timeout=400)
    assert second.returncode == 0, output
    assert "goes on from" in output
    written = json.loads((tmp_path / "second" / "output.json").read_text())
    (model,) = written["artifacts"]["distilled_student"]["artifacts"]
    assert model["uri"] == f"{BUCKET}/out/distilled_student"
    record = read_record(tmp_path / "second" / "student")
    assert (record.lineage["teacher"], record.lineage["pipeline_run_id"]) == ("org/teacher", "run-1")
    weights = load_file(tmp_path / "second" / "student" / "model.safetensors")
    assert all(bool(torch.isfinite(tensor).all()) for tensor in weights.values())
    assert record.figures["steps"] == 24
    assert storage.file_sizes(f"{BUCKET}/checkpoints") == {}
    assert kubernetes.jobs == {}


@pytest.mark.slow
def test_two_nodes_train_a_teacher_that_only_the_step_can_reach(
    bucket: str, kubernetes: FakeKubernetes, tmp_path: Path, save_tiny_model: Save
) -> None:
    storage.delete(f"{BUCKET}/checkpoints")
    mounted, data = save_tiny_model(tmp_path / "mounted", seed=2), tmp_path / "data"
    data.mkdir()
    (data / "file").write_text("whole")
    nodes = Nodes(kubernetes, tmp_path / "nodes")

    def away_for_them(job: dict[str, Any]) -> None:
        mounted.rename(tmp_path / "away")
        nodes.start(job)

    kubernetes.on_create = away_for_them
    call = Call(
        output_file=tmp_path / "output.json",
        artifacts={"tuned_teacher": f"{BUCKET}/out/tuned_teacher"},
        inputs={"data": f"{BUCKET}/in/data"},
    )
    training = {"batch_size": 4, "micro_batch_size": 1, "max_steps": 2}
    config = {
        "teacher": str(mounted),
        "teacher_sft": {"training": training, "multinode": {"nodes": 2}},
        "task": TASK,
    }
    out = tmp_path / "tuned"
    options = {"data": str(data), "teacher_out": str(out), "config": json.dumps(config)}
    process = started("teacher_sft", options, call, tmp_path, kubernetes)
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 0, output
    record = read_record(out)
    assert (record.lineage["reference"], record.figures["steps"]) == (str(mounted), 2)
    assert record.lineage["base_weights_sha256"] == weights_digest(tmp_path / "away")
    written = json.loads((tmp_path / "output.json").read_text())["artifacts"]
    assert written["tuned_teacher"]["artifacts"][0]["uri"] == f"{BUCKET}/out/tuned_teacher"
    assert storage.file_sizes(f"{BUCKET}/checkpoints") == {}
