from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from skd_lib.config import SpecdecConfig, TaskConfig
from skd_lib.errors import SkdError
from skd_lib.report.folders import read_drafts
from skd_lib.results import Specdec
from skd_lib.sampling.engine import Sampler
from skd_lib.specdec.benchmark import measure
from skd_lib.specdec.vllm import Served
from skd_lib.steps.specdec_benchmark import main
from tests.conftest import SaveTinyModel
from tests.evaluation.test_evaluate_step import prepared
from tests.specdec.test_served import measurement

CONFIG = {"examples": 4, "gamma": 3, "sweep": "none", "batch_sizes": [4], "temperatures": [0], "repeats": 1}
TASK = {"max_new_tokens": 8}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, save_tiny_model: SaveTinyModel) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("specdec")
    return {
        "teacher": save_tiny_model(root / "teacher"),
        "draft_before": save_tiny_model(root / "before", seed=1, layers=1),
        "draft_after": save_tiny_model(root / "after", seed=2, layers=1),
        "data": prepared(root),
    }


def run(folders: dict[str, Path], out: Path, tracking_uri: str = "", **config: Any) -> dict[str, Any]:
    settings = {"specdec": CONFIG, "task": TASK} | config
    main(
        **folders,
        config=json.dumps(settings),
        drafts_out=out / "drafts",
        tracking_uri=tracking_uri,
        experiment="tests",
    )
    assert json.loads((out / "executor_output.json").read_text())["parameterValues"] == {}
    return {moment: json.loads((out / "drafts" / f"{moment}.json").read_text()) for moment in ("before", "after")}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_outputs(folders: dict[str, Path], tmp_path: Path, temperature: float) -> None:
    results = run(folders, tmp_path, specdec={**CONFIG, "temperatures": [temperature]}, label="skd-seed-1")
    for moment, values in results.items():
        assert values.pop("label") == "skd-seed-1"
        result = Specdec.model_validate(values)
        assert (result.prompts, result.temperature) == (4, temperature)
        assert 0 <= result.acceptance_rate <= 1
        assert result.speedup > 0
        assert result.vllm is not None
        assert result.vllm.reasons == []
        words = shlex.split(result.vllm.command)
        assert words[2] == str(folders["teacher"])
        assert json.loads(words[-1])["model"] == str(folders[f"draft_{moment}"])


def test_vllm_measures_both_drafts(folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def canned(teacher: Served, drafts: dict[str, Served], prompts: list[list[int]], *_: Any, **__: Any) -> Any:
        asked.extend([teacher.folder, *(draft.folder for draft in drafts.values()), len(prompts)])
        return measurement(*drafts)

    monkeypatch.setattr("skd_lib.specdec.served.measure_served", canned)
    results = run(folders, tmp_path, specdec={**CONFIG, "engine": "vllm"})
    assert asked == [folders["teacher"], folders["draft_before"], folders["draft_after"], 4]
    assert [results[moment]["engine"] for moment in results] == ["vllm", "vllm"]
    _, drafts = read_drafts(tmp_path / "drafts")
    assert drafts["after"].served is not None
    assert list(drafts["after"].served.drafts) == ["after"]
    assert drafts["after"].vllm is not None
    assert drafts["after"].vllm.started


def test_the_report_reads_what_the_step_wrote(folders: dict[str, Path], tmp_path: Path) -> None:
    result = run(folders | {"draft_after": folders["teacher"]}, tmp_path, label="trial")["after"]
    label, drafts = read_drafts(tmp_path / "drafts")
    assert (label, list(drafts)) == ("trial", ["before", "after"])
    figures = drafts["after"].figures()
    assert figures["acceptance_rate"] == 1  # a teacher drafting for itself
    assert figures["speedup"] == result["speedup"]
    assert "label" not in drafts["after"].model_dump()


def test_a_prompt_beyond_the_models_positions_is_left_out(folders: dict[str, Path]) -> None:
    models = {name: Served(folders[name], str(folders[name])) for name in ("teacher", "draft_after")}
    config = SpecdecConfig.model_validate({**CONFIG, "examples": 2})
    inputs = ["le fichier " * 600, "le fichier", "les fichiers", "un fichier"]

    def measured(inputs: list[str]) -> Specdec:
        task = TaskConfig(prompt="{source}", **TASK)
        return measure(models["teacher"], {"it": models["draft_after"]}, inputs, task=task, config=config, seed=0)["it"]

    assert measured(inputs).prompts == 2
    with pytest.raises(SkdError, match="longest prompt"):
        measured(inputs[:1])


def test_a_sampler_that_is_wrong_fails_the_step(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample = Sampler.sample

    def wrong(self: Sampler, *args: Any, **kwargs: Any) -> Any:
        samples = sample(self, *args, **kwargs)
        if self.rule.name == "lossless":
            samples.tokens_BT[:, 0] = (samples.tokens_BT[:, 0] + 1) % 320
        return samples

    monkeypatch.setattr(Sampler, "sample", wrong)
    with pytest.raises(SkdError, match="prompt 0, response position 0"):
        run(folders, tmp_path)
    assert not (tmp_path / "executor_output.json").exists()


@pytest.mark.slow
def test_tracked(folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import MlflowClient

    monkeypatch.setenv("KFP_RUN_ID", "run-1")
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    results = run(folders, tmp_path, tracking_uri=uri)
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("tests")
    assert experiment is not None
    found = client.search_runs([experiment.experiment_id], "tags.`kfp.task` = 'specdec_benchmark'")
    assert found[0].data.metrics["draft_before/speedup"] == pytest.approx(results["before"]["speedup"])
    assert found[0].data.metrics["draft_after/acceptance_rate"] == pytest.approx(results["after"]["acceptance_rate"])
    kept = client.download_artifacts(found[0].info.run_id, "specdec.json", str(tmp_path))
    logged = json.loads(Path(kept).read_text())
    assert {moment: {"label": "", **values} for moment, values in logged.items()} == results
    assert found[0].inputs is not None
    assert found[0].inputs.dataset_inputs[0].dataset.name == "test"


def test_nothing_is_measured_where_nobody_wants_it(folders: dict[str, Path], tmp_path: Path) -> None:
    results = run(folders, tmp_path, drafts=False, label="trial")
    assert results == {"before": {"label": "trial"}, "after": {"label": "trial"}}
    assert read_drafts(tmp_path / "drafts") == ("trial", {})


def test_models_that_are_gone_are_named(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(SkdError, match="the input `draft_before` is gone from storage"):
        run(folders | {"draft_before": tmp_path / "nowhere"}, tmp_path)
