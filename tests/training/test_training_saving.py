"""Checkpoints by time, written while training goes on."""

from __future__ import annotations

import errno
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, TrainerCallback

from skd_lib._core import machine
from skd_lib.errors import Preempted
from skd_lib.training.checkpoints import MARKER, Attempt
from tests.training.tiny_task import AtStep, run, saved

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
    monkeypatch.setattr("skd_lib.training.saving.free_memory", lambda: 2**30)
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


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread that writes checkpoints finds no space."""
    save = torch.save

    def full(states: Any, file: Any, *args: Any) -> None:
        if Path(file).name == "optimizer.pt" and threading.current_thread() is not threading.main_thread():
            raise OSError(errno.ENOSPC, "No space left on device", str(file))
        save(states, file, *args)

    monkeypatch.setattr(torch, "save", full)


@pytest.mark.usefixtures("full_disk")
def test_a_checkpoint_that_cannot_be_written_ends_the_training(student: PreTrainedModel, tmp_path: Path) -> None:
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


@pytest.mark.usefixtures("full_disk")
def test_after_sigterm_nothing_is_claimed_that_is_not_done(student: PreTrainedModel, tmp_path: Path) -> None:
    stop: list[TrainerCallback] = [AtStep(2, signal.SIGTERM)]
    with pytest.raises(OSError, match="No space left on device"):
        run(student, None, tmp_path, method="sft", callbacks=stop)


def test_after_sigterm_nothing_is_said_before_it_is_done(
    student: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    commit = Attempt.commit

    def watched(*args: Any) -> str:
        assert not caplog.records
        return commit(*args)

    monkeypatch.setattr(Attempt, "commit", watched)
    stop: list[TrainerCallback] = [AtStep(2, signal.SIGTERM)]
    with caplog.at_level("WARNING", "skd_lib"), pytest.raises(Preempted) as told:
        run(student, None, tmp_path, method="sft", callbacks=stop)
    place = saved(tmp_path, 2)
    assert str(told.value).startswith(f"stopped by SIGTERM after optimiser step 2; its checkpoint is {place}\n")
    assert (place / MARKER).exists()


def test_free_memory_is_what_the_control_group_leaves(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(machine, "CONTROL_GROUP", tmp_path)
    assert 10_000 < machine.free_memory() <= machine.total_memory()
    limits = {"memory.max": "10000\n", "memory.current": "7000\n", "memory.stat": "anon 5000\ninactive_file 1500\n"}
    for name, text in limits.items():
        (tmp_path / name).write_text(text)
    assert machine.free_memory() == 4500
    (tmp_path / "memory.max").write_text("max\n")
    assert machine.free_memory() > 10_000
