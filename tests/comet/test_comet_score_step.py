"""Step `comet_score` where there is no COMET: it does nothing unless asked, and a run goes on without it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from skd_lib.comet.checkpoint import Checkpoint
from skd_lib.comet.scoring import score_models
from skd_lib.config import TaskConfig
from skd_lib.errors import SkdError
from skd_lib.evaluation.predictions import read_predictions
from skd_lib.steps.comet_score import main
from tests.comet.answers import write_answers

ASKED = json.dumps({"metrics": ["chrf", "comet"]})


def run(folder: Path, **options: Any) -> dict[str, Any]:
    outputs = {"segments_out": folder / "segments.jsonl", "metrics_out": folder / "metrics.json"}
    main(**{**write_answers(folder), **outputs, **options})
    output: dict[str, Any] = json.loads((folder / "executor_output.json").read_text(encoding="utf-8"))
    return output


def test_nothing_is_done_unless_the_task_asks_for_it(tmp_path: Path) -> None:
    output = run(tmp_path, task_config='{"metrics": ["chrf"]}', config='{"comet": {"model": "nobody/nothing"}}')
    scores = output["parameterValues"]["scores"]
    assert (scores["models"], scores["comparisons"], scores["missing"]) == ({}, {}, "")
    assert (tmp_path / "segments.jsonl").read_text() == ""
    assert output["artifacts"]["metrics"]["artifacts"][0]["metadata"] == {}


def test_what_is_missing_is_said_and_the_step_succeeds(tmp_path: Path) -> None:
    scores = run(tmp_path, task_config=ASKED)["parameterValues"]["scores"]
    assert scores["models"] == {}
    assert scores["missing"].startswith("Unbabel/wmt22-comet-da: cannot reach the Hugging Face hub")


def test_a_wrong_option_is_an_error_all_the_same(tmp_path: Path) -> None:
    with pytest.raises(SkdError, match=r"--config, field `comet.modell`: unknown field"):
        run(tmp_path, task_config=ASKED, config='{"comet": {"modell": "x"}}')


def test_as_a_command_in_a_container_without_comet(tmp_path: Path) -> None:
    """Up to the interpreter everything is there; the container's installs nothing."""
    model = tmp_path / "model"
    for name in ("checkpoints", "encoder"):
        (model / name).mkdir(parents=True)
    (model / "checkpoints" / "model.ckpt").touch()
    (model / "hparams.yaml").write_text("{class_identifier: regression_metric, pretrained_model: x}")
    options = {**write_answers(tmp_path), "segments_out": tmp_path / "s.jsonl", "metrics_out": tmp_path / "m.json"}
    options |= {"task_config": ASKED, "config": json.dumps({"comet": {"model": str(model)}})}
    line = [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    done = subprocess.run(
        [sys.executable, "-m", "skd_lib.steps.comet_score", *line],
        env={**os.environ, "KUBERNETES_SERVICE_HOST": "10.0.0.1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "COMET is missing from this run: this container has no COMET" in done.stderr
    output = json.loads((tmp_path / "executor_output.json").read_text())
    assert "images/comet" in output["parameterValues"]["scores"]["missing"]


def test_an_interpreter_without_comet(tmp_path: Path) -> None:
    """The real worker, which finds no COMET here."""
    (tmp_path / "model.ckpt").touch()
    checkpoint = Checkpoint("tiny", tmp_path / "model.ckpt", {"class_identifier": "regression_metric"}, tmp_path)
    answers = {role: read_predictions(path) for role, path in write_answers(tmp_path).items() if role != "champion"}
    with pytest.raises(SkdError, match=r"^tiny: COMET failed: PackageNotFoundError"):
        score_models(answers, checkpoint, Path(sys.executable), batch_size=2)
    with pytest.raises(SkdError, match="answered different examples"):
        score_models({**answers, "other": answers["teacher"][1:]}, checkpoint, Path(sys.executable), batch_size=2)
    with pytest.raises(SkdError, match="no predictions to score"):
        score_models({"teacher": []}, checkpoint, Path(sys.executable), batch_size=2)


def test_evaluate_leaves_comet_to_this_step() -> None:
    assert TaskConfig(metrics=["comet", "chrf"]).own_metrics == ["chrf"]
    assert not TaskConfig().wants_comet
