"""The training benchmark on tiny models: every trainer makes its steps, and what is compared is comparable."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from benchmark import app
from skd_lib.bench.setup import Settings
from skd_lib.errors import SkdError
from tests.conftest import SaveTinyModel
from training import OURS, PHASES, TRAINERS, TRL_PINS, Result, Row, bench_training

SIZE = ["--batch-size", "3", "--prompt-tokens", "8", "--new-tokens", "6", "--device", "cpu"]


@pytest.fixture
def pair(save_tiny_model: SaveTinyModel, tmp_path: Path) -> tuple[str, str]:
    """Teacher and student."""
    return str(save_tiny_model(tmp_path / "teacher", layers=3)), str(save_tiny_model(tmp_path / "student", seed=1))


def measured(pair: tuple[str, str], output: Path, *options: str) -> tuple[dict[str, Any], str]:
    teacher, student = pair
    command = ["training", "--teacher", teacher, "--student", student, *SIZE, *options]
    done = CliRunner(env={"COLUMNS": "100"}).invoke(app, [*command, "--output", str(output)])
    assert done.exit_code == 0, done.output
    values: dict[str, Any] = json.loads(output.read_text())
    for row in values["rows"]:
        assert set(row["phases"]) == set(PHASES)
        for step, seconds in enumerate(row["seconds"]):
            phases = [row["phases"][phase][step] for phase in PHASES]
            assert min(phases) > 0
            assert sum(phases) < seconds
        assert min(row["cpu_seconds"]) > 0
        assert 2**26 < row["peak_memory"] < 2**33  # a process with torch in it
        assert (row["acceptance"] is not None) == (row["name"] == "skd")
    return values, done.output


@pytest.mark.slow
def test_without_trl_ours_are_measured_alone_and_it_is_said_why(
    pair: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SKD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    values, printed = measured(
        pair, tmp_path / "bench.json", "--repeats", "2", "--one-at-a-time", "--top-k", "320", "--gradient-checkpointing"
    )
    assert [(row["name"], len(row["seconds"])) for row in values["rows"]] == [(name, 2) for name in OURS]
    assert values["rows"][1]["acceptance"] == 1  # K is the whole vocabulary
    assert values["ratios"] == []
    assert "pip could not install TRL" in values["without_trl"]
    assert "without TRL: " in printed
    assert values["gradient_checkpointing"]
    assert "ours with gradient checkpointing" in printed


@pytest.mark.trl
def test_with_trl(pair: tuple[str, str], tmp_path: Path) -> None:
    values, printed = measured(pair, tmp_path / "bench.json", "--repeats", "1")
    assert [row["name"] for row in values["rows"]] == [*OURS, *TRAINERS]
    assert f"trl=={values['trl']}" in TRL_PINS.read_text().splitlines()
    assert [(ratio["ours"], ratio["theirs"]) for ratio in values["ratios"]] == [
        (ours, theirs) for ours in OURS for theirs in TRAINERS
    ]
    for name in (*OURS, *TRAINERS):
        assert name in printed


def test_ratios_are_of_steps_side_by_side() -> None:
    # The machine was slow during the second turn.
    times = {"on_policy": [1.0, 9.0, 1.0], "skd": [3.0, 27.0, 3.0], "GKDTrainer": [2.0, 18.0, 4.0]}
    rows = [
        Row(name, seconds, seconds, {}, memory, None)
        for (name, seconds), memory in zip(times.items(), (1, 2, 4), strict=True)
    ]
    ratios = Result(Settings(), 0.5, False, {}, 1, "1", "", rows).ratios()
    assert [(r.ours, r.theirs, r.time, r.cpu_time, r.memory) for r in ratios] == [
        ("on_policy", "GKDTrainer", 0.5, 0.5, 0.25),
        ("skd", "GKDTrainer", 1.5, 1.5, 0.5),
    ]


def test_mistakes_are_named_before_any_work(pair: tuple[str, str], tmp_path: Path) -> None:
    settings = Settings(*pair, dtype="float32", device="cpu", repeats=1)
    for python in (Path(sys.executable), tmp_path / "none"):
        with pytest.raises(SkdError, match="no Python interpreter that has TRL"):
            bench_training(settings, beta=0.5, trl_python=python)


def test_a_trainer_that_fails_is_named_with_its_last_words(
    save_tiny_model: SaveTinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SKD_CACHE", str(tmp_path / "cache"))
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho out of memory >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(broken))
    model = str(save_tiny_model(tmp_path / "model"))
    with pytest.raises(SkdError, match=r"`on_policy` failed:\n  out of memory"):
        bench_training(Settings(model, model, prompt_tokens=4, dtype="float32", device="cpu"), beta=0.5)
