"""A training that was killed ends as if it had not been."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_task import ROOT, WORKER, run
from transformers import AutoModelForCausalLM, PreTrainedModel

from skd_lib.training.checkpoints import MARKER, checkpoint_dir, last_complete
from skd_lib.training.stream import TrainingStream


def test_killed_and_resumed_equals_uninterrupted(tiny_model: Callable[..., PreTrainedModel], tmp_path: Path) -> None:
    settings = {"method": "skd", "max_steps": 8, "eval_steps": 3, "micro_batch_size": 2, "dropout": 0.2}
    student, teacher = tmp_path / "student", tmp_path / "teacher"
    tiny_model(seed=1, vocab_size=64).save_pretrained(student)
    tiny_model(seed=2, vocab_size=64).save_pretrained(teacher)
    folders = {"student": str(student), "teacher": str(teacher), "checkpoints": str(tmp_path / "killed")}
    options = {**folders, "training": settings, "kill_after": 5}
    done = subprocess.run(
        [sys.executable, str(WORKER), json.dumps(options)],
        env={**os.environ, "PYTHONPATH": ROOT},
        timeout=120,
        check=False,
    )
    assert done.returncode == -9
    # The kill also hit the writing of the next checkpoint.
    half_written = shutil.copytree(tmp_path / "killed" / "checkpoint-3", tmp_path / "killed" / "checkpoint-5")
    (half_written / MARKER).unlink()
    (half_written / "optimizer.pt").write_bytes(b"")

    logged: list[int] = []
    results, models = [], []
    for folder in ("killed", "uninterrupted"):
        models.append(AutoModelForCausalLM.from_pretrained(student))
        results.append(
            run(
                models[-1],
                AutoModelForCausalLM.from_pretrained(teacher),
                tmp_path / folder,
                on_metrics=lambda step, _figures: logged.append(step),
                **settings,
            )
        )
    assert logged[:7] == [4, 5, 6, 6, 7, 8, 8]  # from the checkpoint of step 3 on; nothing before it again
    resumed, uninterrupted = (
        [{name: value for name, value in entry.items() if "seconds" not in name} for entry in result.history]
        for result in results
    )
    assert resumed == uninterrupted
    assert results[0].traces == results[1].traces  # the recorded sequences are those of both attempts
    assert [trace.step for trace in results[0].traces if trace.row == 0] == [1, 3, 6, 8]
    assert results[0].best_step == results[1].best_step
    for name, tensor in models[1].state_dict().items():
        assert torch.equal(models[0].state_dict()[name], tensor), name
    last = [
        torch.load(tmp_path / folder / "checkpoint-8" / "optimizer.pt", weights_only=True)
        for folder in ("killed", "uninterrupted")
    ]
    for key, state in last[1]["state"].items():
        assert all(torch.equal(last[0]["state"][key][name], tensor) for name, tensor in state.items())

    # Killed after its last checkpoint, before anything was made of it: nothing is trained again.
    again = AutoModelForCausalLM.from_pretrained(student)
    logged.clear()
    result = run(
        again, AutoModelForCausalLM.from_pretrained(teacher), tmp_path / "killed", on_metrics=logged.append, **settings
    )
    assert logged == []
    assert result.history == results[0].history
    assert result.traces == results[0].traces
    assert all(torch.equal(tensor, models[0].state_dict()[name]) for name, tensor in again.state_dict().items())


def test_the_newest_complete_checkpoint_is_chosen(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert last_complete(tmp_path / "none") is None
    for step, complete in ((5, True), (10, True), (100, False)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        if complete:
            (folder / MARKER).touch()
    assert last_complete(tmp_path) == tmp_path / "checkpoint-10"
    assert "checkpoint-100 was not written to its end" in caplog.text
    assert not (tmp_path / "checkpoint-100").exists()
    (tmp_path / "checkpoint-5" / MARKER).unlink()
    (tmp_path / "checkpoint-10" / MARKER).unlink()
    assert last_complete(tmp_path) is None


def test_the_same_work_finds_its_checkpoints_and_other_work_does_not(tmp_path: Path) -> None:
    def folder(step: str = "distill", *, seed: int = 0, lr: float = 0.1) -> Path:
        return checkpoint_dir(tmp_path, step, seed=seed, config={"learning_rate": lr, "steps": 3})

    assert folder() == checkpoint_dir(tmp_path, "distill", config={"steps": 3, "learning_rate": 0.1}, seed=0)
    assert folder().parent == tmp_path / "distill"
    assert len({folder(), folder("teacher_sft"), folder(seed=1), folder(lr=0.2)}) == 4


def test_the_stream_has_every_example_once_an_epoch_in_another_order() -> None:
    stream = TrainingStream(examples=10, batch_size=4, seed=3)
    epochs = [[stream.example(10 * epoch + offset) for offset in range(10)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert [stream.place(position) for position in (0, 3, 4, 9)] == [(0, 0), (0, 3), (1, 0), (2, 1)]
    again = TrainingStream(examples=10, batch_size=8, seed=3)
    assert [again.example(position) for position in range(10)] == epochs[0]
    other = TrainingStream(examples=10, batch_size=4, seed=4)
    assert [other.example(position) for position in range(10)] != epochs[0]
