"""Step `evaluate_champion`, and the decision of `register_model` behind it, with real models in a real registry."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from skd_lib.config import DataConfig, FilesSource
from skd_lib.data.prepared import prepare
from skd_lib.errors import SkdError
from skd_lib.evaluation.judge import JudgeUnavailable
from skd_lib.evaluation.predictions import read_predictions
from skd_lib.models.files import weights_digest
from skd_lib.steps import evaluate_champion
from skd_lib.tracking.gate import Rival
from skd_lib.tracking.registry import register
from tests.conftest import SaveTinyModel
from tests.evaluation.test_evaluate_step import prepared
from tests.specdec.test_specdec_step import CONFIG as SPECDEC

from .conftest import EXPERIMENT
from .test_steps import measured, registered

TASK = {"max_new_tokens": 8, "metrics": ["chrf", "bleu"]}
EVALUATION = {"batch_size": 4, "bootstrap_samples": 100}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, save_tiny_model: SaveTinyModel) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("champion")
    return {
        "teacher": save_tiny_model(root / "teacher", seed=1, layers=3),
        "student": save_tiny_model(root / "student", seed=2),
        "champion": save_tiny_model(root / "champion", seed=3),
        "data": prepared(root),
    }


class Pipeline:
    """The two steps as a run's pipeline calls them."""

    def __init__(self, folders: dict[str, Path], store: str, out: Path) -> None:
        self.folders, self.store, self.out = folders, store, out

    def measure(self, **changes: Any) -> dict[str, Any]:
        arguments: dict[str, Any] = {
            **{name: self.folders[name] for name in ("student", "teacher", "data")},
            "champion_out": self.out / "champion",
            "config": json.dumps(
                {
                    "evaluation": EVALUATION,
                    "specdec": {**SPECDEC, "gammas": [1, 3], "sweep": "all", "batch_sizes": [4, 1]},
                    "task": TASK,
                }
            ),
            "tracking_uri": self.store,
            "experiment": EXPERIMENT,
        }
        evaluate_champion.main(**(arguments | changes))
        champion: dict[str, Any] = json.loads((self.out / "champion" / "champion.json").read_text())
        return champion

    def register(self, folder: Path, digest: str = "") -> str:
        return register(
            tracking_uri=self.store,
            model_name="skd-student",
            student_uri=str(folder),
            weights_sha256=digest or weights_digest(folder),
            run_id="",
            promote=True,
            figures={"chrf": 99.0, "speedup": 99.0},  # of other data: they must decide nothing
            tags={},
        )

    def decide(self, chrf: float, champion: dict[str, Any], **registry: Any) -> tuple[bool, str]:
        found = measured(chrf, champion=Rival.model_validate(champion), **registry)
        return registered(self.folders["student"], found, self.store)


@pytest.fixture
def pipeline(folders: dict[str, Path], store: str, tmp_path: Path) -> Pipeline:
    return Pipeline(folders, store, tmp_path)


def test_without_a_champion_or_tracking_nothing_is_measured(pipeline: Pipeline) -> None:
    for changes in ({}, {"tracking_uri": ""}):
        champion = pipeline.measure(**changes)
        assert champion["version"] == ""
        assert [path.name for path in (pipeline.out / "champion").iterdir()] == ["champion.json"]
    assert pipeline.decide(30.0, champion) == (True, "first champion of this name, with chrf 30.00")


def test_the_champion_is_measured_on_this_data_and_beside_the_student(
    pipeline: Pipeline, folders: dict[str, Path], client: MlflowClient, capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline.register(folders["champion"])
    champion = pipeline.measure()
    figures = ", ".join(f"{name} {value:.4g}" for name, value in champion["figures"].items())
    assert f"the champion (version 1): {figures}" in capsys.readouterr().out
    assert (champion["version"], champion["missing"], champion["undrafted"]) == ("1", "", "")
    assert set(champion["figures"]) == {"chrf", "bleu"}
    assert 0 <= champion["figures"]["chrf"] < 99
    assert champion["speedup"] > 0
    assert champion["challenger_speedup"] > 0
    assert len(read_predictions(pipeline.out / "champion" / "predictions.jsonl")) == 12
    experiment = client.get_experiment_by_name(EXPERIMENT)
    assert experiment is not None
    (found,) = client.search_runs([experiment.experiment_id], "tags.`kfp.task` = 'evaluate_champion'")
    assert found.data.tags["champion"] == "1"
    assert found.data.metrics["challenger_speedup"] == champion["challenger_speedup"]

    chrf = champion["figures"]["chrf"]
    assert pipeline.decide(chrf + 1, champion, max_slowdown=1)[0]
    assert not pipeline.decide(chrf, champion, max_slowdown=1)[0]
    slower = champion | {"challenger_speedup": 0.9 * champion["speedup"]}
    promote, reason = pipeline.decide(chrf + 1, slower)
    assert not promote
    assert "more than 5 % slower" in reason


def test_a_draft_answers_no_test_set_and_is_decided_by_what_the_teacher_accepts(
    pipeline: Pipeline, folders: dict[str, Path], tmp_path: Path
) -> None:
    pipeline.register(folders["champion"])
    log = tmp_path / "log.jsonl"
    log.write_text("".join(json.dumps({"prompt": f"le {number} a"}) + "\n" for number in range(60)), encoding="utf-8")
    files = FilesSource(train=[str(log)])
    data = DataConfig(source=files, test_examples=20, test_fraction=0.49, near_duplicate_threshold=1)
    prepare(data, tmp_path / "data", seed=0)
    settings = {"evaluation": EVALUATION, "specdec": {**SPECDEC, "batch_sizes": [4], "examples": 20}, "task": TASK}
    config = json.dumps({**settings, "registry": {"gate": "draft"}})
    champion = pipeline.measure(data=tmp_path / "data", config=config)
    gain = champion["challenger_tokens_per_call"] - champion["tokens_per_call"]
    assert champion["gain_low"] < gain < champion["gain_high"]
    assert champion["figures"] == {}
    assert [path.name for path in (pipeline.out / "champion").iterdir()] == ["champion.json"]
    assert 1 <= champion["tokens_per_call"] <= SPECDEC["gamma"] + 1
    for low, promoted in ((0.01, True), (-0.01, False)):
        found = champion | {"gain_low": low}
        promote, reason = pipeline.decide(0.0, found, gate="draft", max_slowdown=1)
        assert promote == promoted, reason
        assert "tokens per teacher call against" in reason


def test_a_student_with_the_champions_weights(pipeline: Pipeline, folders: dict[str, Path]) -> None:
    pipeline.register(folders["student"])
    champion = pipeline.measure()
    assert champion["is_this_student"]
    assert champion["figures"] == {}
    assert pipeline.decide(1.0, champion)[0]


def test_a_champion_with_other_weights_stays(pipeline: Pipeline, folders: dict[str, Path]) -> None:
    pipeline.register(folders["champion"], digest="c" * 64)
    champion = pipeline.measure()
    assert "other weights than those registered" in champion["missing"]
    promote, reason = pipeline.decide(99.0, champion)
    assert not promote
    assert "could not be measured; set the alias champion by hand" in reason


def test_without_the_judge_the_step_fails(pipeline: Pipeline, folders: dict[str, Path]) -> None:
    """Otherwise the champion would stay in place since the judge was down for a moment."""
    pipeline.register(folders["champion"])
    judge = {"url": "http://127.0.0.1:9/v1", "model": "big", "retries": 0}
    config = {"evaluation": {**EVALUATION, "judge": judge}, "task": {**TASK, "metrics": ["chrf", "judge"]}}
    with pytest.raises(JudgeUnavailable, match="does not answer"):
        pipeline.measure(config=json.dumps(config))


@pytest.mark.parametrize("what", ["all of it", "its weights"])
def test_without_the_champions_files_the_step_fails(
    pipeline: Pipeline, folders: dict[str, Path], tmp_path: Path, what: str
) -> None:
    folder = Path(shutil.copytree(folders["champion"], tmp_path / "moved"))
    pipeline.register(folder)
    if what == "all of it":
        shutil.rmtree(folder)
    else:
        (folder / "model.safetensors").unlink()
    with pytest.raises(SkdError, match="its weights cannot be had") as error:
        pipeline.measure()
    assert error.value.where.startswith("champion, version 1")
    assert "skd promote" in error.value.hint
    assert not (pipeline.out / "executor_output.json").exists()


@pytest.mark.parametrize("name", ["student", "teacher", "data"])
@pytest.mark.parametrize("tracked", [True, False])
def test_without_an_inputs_files_the_step_fails(
    pipeline: Pipeline, folders: dict[str, Path], tmp_path: Path, name: str, tracked: bool
) -> None:
    """As after a lifecycle rule of the bucket, where Kubeflow took the student from its cache."""
    pipeline.register(folders["student"])  # the champion is this very student
    with pytest.raises(SkdError, match=f"the input `{name}` is gone from storage"):
        pipeline.measure(**{name: tmp_path / "nowhere"}, **({} if tracked else {"tracking_uri": ""}))
    assert not (pipeline.out / "executor_output.json").exists()


def test_a_champion_that_cannot_draft_is_compared_by_score(
    pipeline: Pipeline, folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(folders["champion"], tmp_path / "foreign"))
    config = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(config | {"eos_token_id": 5}))
    pipeline.register(folder)
    champion = pipeline.measure()
    assert "end-of-sequence ids" in champion["undrafted"]
    assert champion["speedup"] is None
    promote, reason = pipeline.decide(99.0, champion)
    assert promote
    assert "not compared as drafts" in reason


def test_another_version_became_champion_meanwhile(pipeline: Pipeline, folders: dict[str, Path]) -> None:
    champion = pipeline.measure()
    pipeline.register(folders["champion"])
    assert pipeline.decide(99.0, champion) == (
        False,
        "version 1 is the champion now, and was not when this run measured; start the run again to compare with it",
    )
