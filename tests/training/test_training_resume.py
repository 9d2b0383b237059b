"""A training that was killed ends as if it had not been."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from skd_lib.errors import Preempted
from skd_lib.report.course import curves
from skd_lib.training.trainer import TrainingStream
from tests.training.nursery import Nursery
from tests.training.tiny_task import newest, run, saved


def test_killed_and_resumed_equals_uninterrupted(nursery: Nursery, models: dict[str, Any], tmp_path: Path) -> None:
    settings: dict[str, Any] = {"max_steps": 8, "eval_steps": 3, "micro_batch_size": 2, "dropout": 0.2}
    # Everything that depends on the step or the row: which rows are sampled, and how.
    sampling = {"top_k": {"start": 60, "end": 2, "shape": "cosine"}, "gamma": {"start": 2, "end": 5}}
    distill = {"sampling": sampling, "sampled_fraction": {"start": 0.2, "end": 0.9}}
    settings |= {"method": "skd_mixed", "distill": distill}
    options = {**models, "checkpoints": str(tmp_path / "killed"), "training": settings, "kill_at_step": 6}
    assert nursery.run(options) == [-signal.SIGKILL]

    logged: list[int] = []
    results, students = [], []
    for folder in ("killed", "uninterrupted"):
        students.append(AutoModelForCausalLM.from_pretrained(models["student"]))
        results.append(
            run(
                students[-1],
                AutoModelForCausalLM.from_pretrained(models["teacher"]),
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
    # What had been spent before each validation is counted on: tokens exactly, seconds of both attempts.
    spent = [curves(result.history, batch_size=4) for result in results]
    for figure in ("validation_steps", "validation_tokens", "validation_student_tokens", "validation_teacher_tokens"):
        assert spent[0][figure] == spent[1][figure] == sorted(set(spent[0][figure]))
    assert len(spent[0]["validation_seconds"]) == len(set(spent[0]["validation_seconds"])) == 4
    assert spent[0]["validation_seconds"] == sorted(spent[0]["validation_seconds"])
    assert results[0].traces == results[1].traces  # the recorded sequences are those of both attempts
    assert {trace.step for trace in results[0].traces} >= {3, 6, 8}  # in step 1 few sequences are sampled
    assert results[0].best_step == results[1].best_step
    for name, tensor in students[1].state_dict().items():
        assert torch.equal(students[0].state_dict()[name], tensor), name
    last = [
        torch.load(saved(tmp_path / folder, 8) / "optimizer.pt", weights_only=True)
        for folder in ("killed", "uninterrupted")
    ]
    for key, state in last[1]["state"].items():
        assert all(torch.equal(last[0]["state"][key][name], tensor) for name, tensor in state.items())

    # Killed after its last checkpoint, before anything was made of it: nothing is trained again, wherever it is now.
    shutil.move(tmp_path / "killed", tmp_path / "moved")
    again = AutoModelForCausalLM.from_pretrained(models["student"])
    logged.clear()
    teacher = AutoModelForCausalLM.from_pretrained(models["teacher"])
    result = run(again, teacher, tmp_path / "moved", on_metrics=logged.append, **settings)
    assert logged == []
    assert result.history == results[0].history
    assert result.traces == results[0].traces
    assert all(torch.equal(tensor, students[0].state_dict()[name]) for name, tensor in again.state_dict().items())


@pytest.mark.parametrize("moment", ["complete", pytest.param("half-written", marks=pytest.mark.slow)])
def test_killed_at_a_timed_checkpoint_equals_uninterrupted(
    moment: str, nursery: Nursery, models: dict[str, Any], tmp_path: Path
) -> None:
    """Right after a checkpoint by time, and while one is written in the background."""
    training = {"max_steps": 6, "eval_steps": 6, "micro_batch_size": 2}
    options = {**models, "checkpoints": str(tmp_path / "killed"), "training": {**training, "checkpoint_minutes": 1e-9}}
    assert nursery.run({**options, "kill_in_write": moment}) == [-signal.SIGKILL]
    step = int(newest(tmp_path / "killed").name.removeprefix("checkpoint-"))
    assert (step == 1) == (moment == "half-written")
    figures, weights = tmp_path / "figures.json", [tmp_path / f"{name}.safetensors" for name in ("killed", "whole")]
    assert nursery.run({**options, "figures": str(figures), "weights": str(weights[0])}) == [0]
    assert json.loads(figures.read_text())[0]["step"] == step + 1
    whole = {**options, "checkpoints": str(tmp_path / "whole"), "training": training, "weights": str(weights[1])}
    assert nursery.run(whole) == [0]
    resumed, uninterrupted = map(load_file, weights)
    assert all(torch.equal(resumed[name], tensor) for name, tensor in uninterrupted.items())


@pytest.mark.slow
def test_two_attempts_at_once_leave_each_other_alone(nursery: Nursery, models: dict[str, Any], tmp_path: Path) -> None:
    training = {"max_steps": 8, "eval_steps": 1, "batch_size": 2}
    options = {**models, "checkpoints": str(tmp_path / "work"), "training": training}
    weights = [str(tmp_path / f"{number}.safetensors") for number in range(3)]
    assert nursery.run_apart(*({**options, "weights": file} for file in weights)) == [0, 0, 0]
    first, *others = map(load_file, weights)
    assert all(torch.equal(other[name], tensor) for other in others for name, tensor in first.items())


KILLS = int(os.environ.get("SKD_TEST_KILLS", "3"))
"""`SKD_TEST_KILLS=10`: before a release."""


@pytest.mark.slow
def test_killed_several_times_anywhere_equals_uninterrupted(
    nursery: Nursery, models: dict[str, Any], tmp_path: Path
) -> None:
    """Killed in steps, in validations and between a checkpoint's files; once a checkpoint lost half of a file too."""
    training = {
        "max_steps": 6 + 3 * KILLS,
        "eval_steps": 2,
        "batch_size": 2,
        "micro_batch_size": 1,
        "keep_checkpoints": 2,
    }
    killed = {**models, "checkpoints": str(tmp_path / "killed"), "training": training}
    rng = random.Random(1)
    for attempt in range(KILLS):
        assert nursery.run({**killed, "kill_after_events": rng.randint(15, 45)}) == [-signal.SIGKILL]
        if attempt == KILLS - 1:
            cut = newest(tmp_path / "killed") / "optimizer.pt"
            cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    weights = [tmp_path / name for name in ("killed.safetensors", "whole.safetensors")]
    assert nursery.run({**killed, "weights": str(weights[0])}) == [0]
    assert f"{cut.parent} is left out: its file optimizer.pt is missing or was cut off" in nursery.log.read_text()
    whole = {**killed, "checkpoints": str(tmp_path / "whole"), "weights": str(weights[1])}
    assert nursery.run(whole) == [0]
    resumed, uninterrupted = map(load_file, weights)
    assert all(torch.equal(resumed[name], tensor) for name, tensor in uninterrupted.items())


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_sigterm_saves_the_step_and_stops(
    processes: int, nursery: Nursery, models: dict[str, Any], tmp_path: Path
) -> None:
    training = {"max_steps": 6, "eval_steps": 3, "batch_size": 4, "checkpoint_minutes": 1e-9}
    stopped = {**models, "checkpoints": str(tmp_path / "stopped"), "training": training}
    # The signal reaches one process, twice.
    codes = nursery.run({**stopped, "sigterm_at_step": 2}, processes)
    assert codes == [Preempted.exit_code] * processes
    assert newest(tmp_path / "stopped").name == "checkpoint-2"
    weights = [tmp_path / name for name in ("stopped.safetensors", "whole.safetensors")]
    assert nursery.run({**stopped, "weights": str(weights[0])}, processes) == [0] * processes
    whole = {**stopped, "checkpoints": str(tmp_path / "whole"), "weights": str(weights[1])}
    assert nursery.run(whole, processes) == [0] * processes
    resumed, uninterrupted = map(load_file, weights)
    assert all(torch.equal(resumed[name], tensor) for name, tensor in uninterrupted.items())


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
