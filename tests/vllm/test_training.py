"""Training with vLLM's samples against training with this project's own."""

from __future__ import annotations

import subprocess
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, TrainerCallback

from skd_lib.config import SamplingParams
from skd_lib.models.loading import load_model
from skd_lib.training.run import TrainResult
from skd_lib.vllm.client import Engine
from skd_lib.vllm.sampler import VllmEngine
from skd_lib.vllm.serve import environment, start
from tests.training.tiny_task import EOS, run
from tests.vllm.conftest import Pair, served

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]

WARM = SamplingParams(temperature=1.0, top_p=0.9)  # as `tiny_task.run` samples


def by_vllm(pair: Pair, server: Engine, folder: Path, callbacks: Any = (), **options: Any) -> TrainResult:
    student = load_model(pair.folders["student"])
    engine = replace(pair.engine(server, folder / "weights", (WARM, WARM), new=8), student=student, pad_id=EOS)
    return trained(student, engine.head, folder, engine, callbacks=list(callbacks), **options)


def trained(
    student: PreTrainedModel, teacher: PreTrainedModel, folder: Path, engine: VllmEngine | None, **options: Any
) -> TrainResult:
    settings = {"learning_rate": 1e-3, "dropout": 0.0, "max_steps": 20, "eval_steps": 10, **options}
    sources: dict[str, Any] = {} if engine is None else {"signals": engine, "sampler_at": engine.sampler}
    return run(student, teacher, folder / "checkpoints", **sources, **settings)


def losses(result: TrainResult) -> list[float]:
    return [entry[name] for entry in result.history for name in ("loss", "validation_loss") if name in entry]


def largest_difference(one: PreTrainedModel, other: PreTrainedModel) -> float:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return max(float((a - b).abs().max()) for a, b in pairs)


@pytest.mark.parametrize("method", ["skd", "skd_mixed", "on_policy"])
def test_twenty_steps_are_those_of_the_own_engine(pair: Pair, server: Engine, tmp_path: Path, method: str) -> None:
    own = trained(load_model(pair.folders["student"]), pair.teacher, tmp_path / "own", None, method=method)
    other = by_vllm(pair, server, tmp_path / "vllm", method=method)
    assert losses(other) == pytest.approx(losses(own), rel=1e-3, abs=1e-4)
    assert largest_difference(own.student, other.student) < 2e-3
    moved = largest_difference(own.student, load_model(pair.folders["student"]))
    assert moved > 5e-3  # else nothing was trained


def test_a_server_that_is_killed_and_started_again_changes_nothing(pair: Pair, tmp_path: Path) -> None:
    """It is gone at the third step and comes back while the training waits."""
    python, port = environment(), 8163
    logs = (tmp_path / "log").open("w")
    processes = [start(served(pair, 16), python, port, stdout=logs)]
    threads: list[threading.Thread] = []

    class Kill(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 3:
                processes[0].kill()
                processes[0].wait()
                threads.append(threading.Thread(target=again))
                threads[0].start()

    def again() -> None:
        time.sleep(1)
        processes.append(start(served(pair, 16), python, port, stdout=logs))

    try:
        server = Engine(f"http://127.0.0.1:{port}")
        server.wait()
        with_kill = by_vllm(pair, server, tmp_path / "killed", [Kill()], max_steps=6, eval_steps=6)
        without = by_vllm(pair, server, tmp_path / "quiet", max_steps=6, eval_steps=6)
    finally:
        for thread in threads:
            thread.join()
        for process in processes:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
    assert len(processes) == 2
    assert losses(with_kill) == pytest.approx(losses(without), rel=1e-4)
    assert largest_difference(with_kill.student, without.student) < 1e-4
    assert torch.isfinite(torch.tensor(losses(with_kill))).all()
