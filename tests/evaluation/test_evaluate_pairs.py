"""The steps that evaluate a model before and after training: `evaluate_teacher` and `evaluate_student`."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import GenerationConfig

from skd_lib.errors import SkdError
from skd_lib.evaluation import evaluate, generate
from skd_lib.evaluation.predictions import read_predictions
from skd_lib.models.importing import import_model
from skd_lib.models.records import RECORD, read_record, write_record
from skd_lib.models.references import model_fingerprint
from skd_lib.report.folders import read_evaluations
from skd_lib.steps import evaluate_student, evaluate_teacher
from skd_lib.tracking.runs import RunLog
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


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The folders of the models that answer, in their order."""
    folders: list[Path] = []
    load = generate.load_for_inference

    def watched(path: Path) -> Any:
        folders.append(path)
        return load(path)

    monkeypatch.setattr(generate, "load_for_inference", watched)
    return folders


@pytest.fixture
def generations(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many answers each generation makes."""
    counts: list[int] = []
    generate = evaluate.generate

    def watched(model: Any, tokenizer: Any, sources: list[str], *rest: Any, **options: Any) -> Any:
        counts.append(len(sources))
        return generate(model, tokenizer, sources, *rest, **options)

    monkeypatch.setattr(evaluate, "generate", watched)
    return counts


def with_sampling_defaults(folder: Path) -> Path:
    """As hub models come."""
    defaults = {"do_sample": True, "temperature": 3.0, "repetition_penalty": 5.0}
    config = GenerationConfig.from_pretrained(folder)
    config.update(**defaults)
    config.save_pretrained(folder)
    return folder


def contents(folder: Path) -> dict[str, str]:
    return {str(file.relative_to(folder)): file.read_text() for file in folder.rglob("*") if file.is_file()}


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
        assert run.data.metrics[f"{role}/chrf"] == pytest.approx(each.scores.figures()["chrf"])
    assert {file.path for file in client.list_artifacts(run.info.run_id)} >= set(found)


def test_the_teacher_before_fine_tuning_is_measured_where_it_is(
    before: Path, after: Path, data: Path, tmp_path: Path, loaded: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    """Its folder may have a record of its own, of another run, and sampling defaults."""
    caplog.set_level(logging.INFO)
    source = with_sampling_defaults(shutil.copytree(before, tmp_path / "source"))
    write_record(source, lineage={"method": "of another run"}, figures={"steps": 1}, samples="{}\n")
    evaluate_teacher.main(after, data, tmp_path / "teachers", json.dumps({**SETTINGS, "teacher": str(source)}))
    assert loaded == [source, after]
    told = [text for text in caplog.messages if text.startswith("evaluating ")]
    assert list(dict.fromkeys(text.split()[1] for text in told)) == ["teacher_base", "teacher"]
    evaluate_student.main(before, after, data, tmp_path / "students", json.dumps(SETTINGS))
    assert list(answers(tmp_path / "teachers")) == ["teacher_base", "teacher"]
    assert list(answers(tmp_path / "teachers").values()) == list(answers(tmp_path / "students").values())
    import_model(str(source), source, tmp_path / "imported", fingerprint=model_fingerprint(str(source)))
    assert contents(tmp_path / "teachers" / "teacher_base" / RECORD) == contents(tmp_path / "imported" / RECORD)


def test_a_teacher_that_changes_while_it_is_measured(
    before: Path, after: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = shutil.copytree(before, tmp_path / "source")
    generate = evaluate.generate

    def and_change(*arguments: Any, **options: Any) -> Any:
        (source / "config.json").write_text((source / "config.json").read_text() + "\n")
        return generate(*arguments, **options)

    monkeypatch.setattr(evaluate, "generate", and_change)
    with pytest.raises(SkdError, match="changed after preflight looked at it"):
        evaluate_teacher.main(after, data, tmp_path / "out", json.dumps({**SETTINGS, "teacher": str(source)}))
    assert not (tmp_path / "executor_output.json").exists()


def test_a_teacher_that_is_passed_on_is_measured_once(
    before: Path, data: Path, tmp_path: Path, generations: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with `enabled: false` in section `teacher_sft`, which takes over special ids, and no sampling defaults."""
    source = with_sampling_defaults(shutil.copytree(before, tmp_path / "source"))
    teacher = tmp_path / "teacher"
    lineage = import_model(str(source), source, teacher, fingerprint=model_fingerprint(str(source)))
    write_record(teacher, lineage=lineage, figures={"steps": 0})
    metrics: dict[str, float] = {}
    monkeypatch.setattr(RunLog, "log_metrics", lambda _, values: metrics.update(values))
    out = tmp_path / "evaluations"
    evaluate_teacher.main(teacher, data, out, json.dumps({**SETTINGS, "teacher": str(source)}))
    assert len(generations) == 1
    base, tuned = (contents(out / role) for role in ("teacher_base", "teacher"))
    scores = [json.loads(each["scores.json"]) for each in (base, tuned)]
    assert [(each.pop("role"), each.pop("model_uri")) for each in scores] == [
        ("teacher_base", str(source)),
        ("teacher", str(teacher)),
    ]
    assert scores[0] == scores[1]
    assert [(used["name"], used["context"]) for used in scores[0]["data"]][-1] == ("test", "test")
    assert tuned["predictions.jsonl"] == base["predictions.jsonl"]
    assert read_record(out / "teacher").figures == {"steps": 0}
    assert read_record(out / "teacher").lineage == read_record(out / "teacher_base").lineage == lineage
    assert metrics["teacher/chrf"] == metrics["teacher_base/chrf"]


@pytest.mark.parametrize(("trained", "times"), [(False, 1), (True, 2)])
def test_a_student_that_training_has_not_changed_is_measured_once(
    trained: bool, times: int, before: Path, after: Path, data: Path, tmp_path: Path, generations: list[int]
) -> None:
    unchanged = shutil.copytree(before, tmp_path / "unchanged")
    evaluate_student.main(before, after if trained else unchanged, data, tmp_path / "out", json.dumps(SETTINGS))
    assert len(generations) == times
    assert list(answers(tmp_path / "out")) == ["student_before", "student_after"]


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
