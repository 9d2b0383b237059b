"""The steps that evaluate a model before and after training: `evaluate_teacher` and `evaluate_student`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from skd_lib.errors import SkdError
from skd_lib.evaluation.predictions import read_predictions
from skd_lib.records import read_record, write_record
from skd_lib.report.evaluations import read_evaluations
from skd_lib.steps import evaluate_student, evaluate_teacher
from tests.conftest import SaveTinyModel
from tests.evaluation.test_evaluate_step import prepared

SETTINGS: dict[str, Any] = {
    "evaluation": {"batch_size": 12, "bootstrap_samples": 100},
    "task": {"max_new_tokens": 6, "metrics": ["chrf"]},
}


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory, save_tiny_model: SaveTinyModel) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model") / "before", seed=3)


@pytest.fixture(scope="module")
def after(tmp_path_factory: pytest.TempPathFactory, save_tiny_model: SaveTinyModel) -> Path:
    folder = save_tiny_model(tmp_path_factory.mktemp("model") / "after", seed=4)
    write_record(folder, lineage={"method": "skd"})
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared(tmp_path_factory.mktemp("data"))


def answers(folder: Path) -> dict[str, list[str]]:
    return {
        role: [row.prediction for row in read_predictions(found.predictions)]
        for role, found in read_evaluations(folder).items()
    }


def test_both_students_are_in_one_folder_and_one_run(
    before: Path, after: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    monkeypatch.setenv("KFP_RUN_ID", "run-1")
    store, out = f"sqlite:///{tmp_path}/mlflow.db", tmp_path / "evaluations"
    evaluate_student.main(before, after, data, out, json.dumps(SETTINGS), tracking_uri=store, experiment="tests")
    found = read_evaluations(out)
    assert list(found) == ["student_before", "student_after"]
    assert read_record(found["student_after"].folder).lineage == {"method": "skd"}
    assert answers(out)["student_before"] != answers(out)["student_after"]
    client = MlflowClient(store)
    experiment = client.get_experiment_by_name("tests")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id], "tags.`kfp.task` = 'evaluate_student'")
    for role, each in found.items():
        assert run.data.metrics[f"{role}.chrf"] == pytest.approx(each.scores.figures()["chrf"])
    assert {file.path for file in client.list_artifacts(run.info.run_id)} >= set(found)


def test_the_teacher_before_fine_tuning_is_fetched(before: Path, after: Path, data: Path, tmp_path: Path) -> None:
    config = json.dumps({**SETTINGS, "teacher": str(before)})
    evaluate_teacher.main(after, data, tmp_path / "teachers", config)
    evaluate_student.main(before, after, data, tmp_path / "students", json.dumps(SETTINGS))
    assert list(answers(tmp_path / "teachers")) == ["teacher_base", "teacher"]
    assert list(answers(tmp_path / "teachers").values()) == list(answers(tmp_path / "students").values())


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        ({}, "--config, field `teacher`"),
        ({"teacher": "BEFORE", "fingerprint": "sha256:" + "0" * 64}, "changed"),
        ({"teacher": "BEFORE", "seed": "x"}, "--config, field `seed`"),
    ],
)
def test_a_teacher_that_is_not_named_or_another_by_now(
    config: dict[str, Any], complaint: str, before: Path, after: Path, data: Path, tmp_path: Path
) -> None:
    config = {name: str(before) if value == "BEFORE" else value for name, value in config.items()}
    with pytest.raises(SkdError) as caught:
        evaluate_teacher.main(after, data, tmp_path / "evaluations", json.dumps(SETTINGS | config))
    assert complaint in str(caught.value)
    assert not (tmp_path / "executor_output.json").exists()
