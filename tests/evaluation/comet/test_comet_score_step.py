"""Step `comet_score` where there is no COMET: it does nothing unless asked, and a run goes on without it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from skd_lib.config import TaskConfig
from skd_lib.errors import SkdError
from skd_lib.evaluation.comet.checkpoint import Checkpoint
from skd_lib.evaluation.comet.scoring import score_models
from skd_lib.evaluation.predictions import Prediction, read_predictions, write_predictions
from skd_lib.steps.comet_score import main
from skd_lib.steps.kfp_call import OUTPUT_FILE_OPTION, Call, called
from tests.evaluation.comet.answers import ANSWERS, EXAMPLES, write_answers

ASKED = {"metrics": ["chrf", "comet"]}


def run(folder: Path, tracking_uri: str = "", **config: Any) -> dict[str, Any]:
    output = folder / "executor_output.json"
    with called(Call(output_file=output)):
        main(**write_answers(folder), config=json.dumps(config), tracking_uri=tracking_uri, experiment="tests")
    return written(output)


def written(output: Path) -> dict[str, Any]:
    """The step's output parameter."""
    scores: dict[str, Any] = json.loads(json.loads(output.read_text(encoding="utf-8"))["parameterValues"]["scores"])
    return scores


def store(folder: Path) -> str:
    return f"sqlite:///{folder}/mlflow.db"


def logged(folder: Path) -> tuple[Any, list[dict[str, Any]]]:
    """The step's MLflow run, and the score of each answer."""
    client = MlflowClient(store(folder))
    experiment = client.get_experiment_by_name("tests")
    assert experiment is not None
    (found,) = client.search_runs([experiment.experiment_id], "tags.`kfp.task` = 'comet_score'")
    text = Path(client.download_artifacts(found.info.run_id, "comet.jsonl", str(folder))).read_text()
    return found, [json.loads(line) for line in text.splitlines()]


def test_nothing_is_done_unless_the_task_asks_for_it(tmp_path: Path) -> None:
    scores = run(tmp_path, task={"metrics": ["chrf"]}, evaluation={"comet": {"model": "an-org/no-such-model"}})
    assert (scores["models"], scores["comparisons"], scores["missing"]) == ({}, {}, "")


def test_what_is_missing_is_said_and_the_step_succeeds(tmp_path: Path) -> None:
    scores = run(tmp_path, task=ASKED)
    assert scores["models"] == {}
    assert scores["missing"].startswith("Unbabel/wmt22-comet-da: cannot reach the Hugging Face hub")


def test_the_scores_are_a_short_parameter_and_each_answers_score_is_in_mlflow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every model, a champion too, is scored; the score is exact and the reason why there is none is cut off."""
    (tmp_path / "champion").mkdir()
    rows = [Prediction(*example, example[2], 3, False) for example in EXAMPLES]
    write_predictions(tmp_path / "champion" / "predictions.jsonl", rows)
    monkeypatch.setattr(
        "skd_lib.evaluation.comet.checkpoint.open_checkpoint", lambda _: Checkpoint("m" * 60, tmp_path, {}, None)
    )
    monkeypatch.setattr("skd_lib.evaluation.comet.environment.comet_python", lambda: Path(sys.executable))
    monkeypatch.setattr("skd_lib.evaluation.comet.scoring.sha256", lambda _: "0" * 64)
    monkeypatch.setattr(
        "skd_lib.evaluation.comet.scoring.ask_worker",
        lambda _, __, rows, **___: ("2.2.7", [1 / (3 + n) for n, _ in enumerate(rows)]),
    )
    monkeypatch.setenv("KFP_RUN_ID", "run-1")
    scores = run(tmp_path, store(tmp_path), task=ASKED)
    assert set(scores["models"]) == {*ANSWERS, "champion"}
    assert len(json.dumps(scores)) < 2000
    found, rows = logged(tmp_path)
    assert [(row["role"], row["id"]) for row in rows[:3]] == [("teacher_base", example[0]) for example in EXAMPLES]
    mean = sum(row["comet"] for row in rows[:3]) / 3
    assert scores["models"]["teacher_base"]["score"] == pytest.approx(mean, rel=1e-12)
    assert found.data.metrics["teacher_base/comet"] == pytest.approx(mean)
    assert found.data.tags["missing"] == ""
    monkeypatch.setattr("skd_lib.evaluation.comet.environment.comet_python", failing)
    assert len(run(tmp_path, task=ASKED)["missing"]) < 700


def failing() -> Path:
    raise SkdError("no" * 10_000)


def test_a_wrong_option_is_an_error_all_the_same(tmp_path: Path) -> None:
    with pytest.raises(SkdError, match=r"--config, field `evaluation.comet.modell`: unknown field"):
        run(tmp_path, task=ASKED, evaluation={"comet": {"modell": "x"}})


def test_as_a_command_in_a_container_without_comet(tmp_path: Path) -> None:
    """Up to the interpreter everything is there; the container's installs nothing."""
    model = tmp_path / "model"
    for name in ("checkpoints", "encoder"):
        (model / name).mkdir(parents=True)
    (model / "checkpoints" / "model.ckpt").touch()
    (model / "hparams.yaml").write_text("{class_identifier: regression_metric, pretrained_model: x}")
    config = {"task": ASKED, "evaluation": {"comet": {"model": str(model)}}}
    options = {**write_answers(tmp_path), "config": json.dumps(config)}
    output = tmp_path / "executor_output.json"
    line = [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    done = subprocess.run(
        [sys.executable, "-m", "skd_lib.steps.comet_score", *line, OUTPUT_FILE_OPTION, str(output)],
        env={**os.environ, "KUBERNETES_SERVICE_HOST": "10.0.0.1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "COMET is missing from this run: this container has no COMET" in done.stderr
    assert "; hint: " in written(output)["missing"]
    assert "the image `comet`" in written(output)["missing"]


def test_an_interpreter_without_comet(tmp_path: Path) -> None:
    """The real worker, which finds no COMET here."""
    (tmp_path / "model.ckpt").touch()
    checkpoint = Checkpoint("tiny", tmp_path / "model.ckpt", {"class_identifier": "regression_metric"}, tmp_path)
    write_answers(tmp_path)
    answers = {file.parent.name: read_predictions(file) for file in tmp_path.rglob("predictions.jsonl")}
    with pytest.raises(SkdError, match=r"^tiny: COMET failed: PackageNotFoundError"):
        score_models(answers, checkpoint, Path(sys.executable), batch_size=2)
    with pytest.raises(SkdError, match="answered different examples"):
        score_models({**answers, "other": answers["teacher"][1:]}, checkpoint, Path(sys.executable), batch_size=2)
    with pytest.raises(SkdError, match="no predictions to score"):
        score_models({"teacher": []}, checkpoint, Path(sys.executable), batch_size=2)


def test_evaluate_leaves_comet_to_this_step() -> None:
    assert TaskConfig(metrics=["comet", "chrf"]).own_metrics == ["chrf"]
    assert not TaskConfig().wants_comet
