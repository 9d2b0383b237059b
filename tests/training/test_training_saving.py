"""Checkpoints by time, written while training goes on."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_task import run
from transformers import PreTrainedModel

from skd_lib import machine
from skd_lib.training.checkpoints import Attempt

EVERY_STEP = 1e-9
"""Minutes."""


@pytest.fixture
def student(tiny_model: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    return tiny_model(seed=1, vocab_size=64)


def test_training_goes_on_while_a_checkpoint_is_written(
    student: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit, went_on, committed = Attempt.commit, threading.Event(), []

    def slow(attempt: Attempt, step: int, *args: Any) -> str:
        assert went_on.wait(20), "training waits for its checkpoint"
        committed.append(step)
        return commit(attempt, step, *args)

    monkeypatch.setattr(Attempt, "commit", slow)
    steps: list[int] = []

    def count(step: int, _figures: dict[str, float]) -> None:
        steps.append(step)
        if step == 4:
            assert committed == []  # one at a time: that of step 1 is not complete yet
            went_on.set()

    run(
        student,
        None,
        tmp_path,
        method="sft",
        max_steps=6,
        eval_steps=6,
        checkpoint_minutes=EVERY_STEP,
        on_metrics=count,
    )
    assert committed[0] == 1
    assert committed[1] >= 4
    assert committed[-1] == 6


def test_without_room_for_a_copy_training_waits(
    student: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("skd_lib.training.snapshots.free_memory", lambda: 2**30)
    commit, threads, step = Attempt.commit, [], 0

    def watched(attempt: Attempt, at: int, *args: Any) -> str:
        threads.append((at, step))
        return commit(attempt, at, *args)

    def count(now: int, _figures: dict[str, float]) -> None:
        nonlocal step
        step = now

    monkeypatch.setattr(Attempt, "commit", watched)
    run(
        student,
        None,
        tmp_path,
        method="sft",
        max_steps=3,
        eval_steps=3,
        checkpoint_minutes=EVERY_STEP,
        on_metrics=count,
    )
    assert threads == [(1, 1), (2, 2), (3, 3)]
    assert "host memory has no room for a copy" in caplog.text


def test_a_checkpoint_that_cannot_be_written_ends_the_training(
    student: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = torch.save

    def full(states: Any, file: Any, *args: Any) -> None:
        if Path(file).name == "optimizer.pt" and threading.current_thread() is not threading.main_thread():
            raise OSError(errno.ENOSPC, "No space left on device", str(file))
        save(states, file, *args)

    monkeypatch.setattr(torch, "save", full)
    steps: list[int] = []
    with pytest.raises(OSError, match="No space left on device"):
        run(
            student,
            None,
            tmp_path,
            method="sft",
            max_steps=500,
            eval_steps=500,
            checkpoint_minutes=EVERY_STEP,
            on_metrics=lambda step, _figures: steps.append(step),
        )
    assert steps[-1] < 100
    assert not list(tmp_path.glob("*/*/complete"))


def test_free_memory_is_what_the_control_group_leaves(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(machine, "_GROUP", tmp_path)
    assert 10_000 < machine.free_memory() <= machine.total_memory()
    limits = {"memory.max": "10000\n", "memory.current": "7000\n", "memory.stat": "anon 5000\ninactive_file 1500\n"}
    for name, text in limits.items():
        (tmp_path / name).write_text(text)
    assert machine.free_memory() == 4500
    (tmp_path / "memory.max").write_text("max\n")
    assert machine.free_memory() > 10_000
