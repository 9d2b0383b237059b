from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from skd_lib.config import DataConfig, EvaluationConfig, FilesSource, TaskConfig
from skd_lib.config.step import StepConfig
from skd_lib.data.examples import make_example
from skd_lib.data.prepared import PreparedData, prepare
from skd_lib.errors import SkdError
from skd_lib.evaluation.evaluate import evaluate
from skd_lib.evaluation.metrics import measure
from skd_lib.evaluation.predictions import read_predictions
from skd_lib.models.loading import load_model
from skd_lib.models.records import read_record, write_record
from skd_lib.steps.evaluate import Role, main
from tests.conftest import SaveTinyModel

VERBS = "open close save delete print share rename move copy paste undo redo find replace select"
TASK: dict[str, Any] = {"max_new_tokens": 12, "stop": ["\n"], "metrics": ["chrf", "bleu", "rougeL"]}
CONFIG = {"batch_size": 4, "bootstrap_samples": 100}
SETTINGS: dict[str, Any] = {"evaluation": CONFIG, "task": TASK, "seed": 1}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, save_tiny_model: SaveTinyModel) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model") / "tiny", seed=3)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared(tmp_path_factory.mktemp("data"))


def prepared(folder: Path) -> Path:
    """A small data set, through the project's own preparation."""
    words = VERBS.split()
    rows = [{"source": f"{a} le {b}", "target": f"{a} the {b} now"} for a in words for b in words[:5]]
    files = {}
    for split, part in {"train": rows[:40], "validation": rows[40:50], "test": rows[50:62]}.items():
        files[split] = folder / f"{split}.jsonl"
        files[split].write_text("".join(json.dumps(row) + "\n" for row in part))
    source = FilesSource(**{split: [str(path)] for split, path in files.items()})
    prepare(DataConfig(source=source, near_duplicate_threshold=1), folder / "prepared", seed=0)
    return folder / "prepared"


def run(model: Path, data: Path, out: Path, **changes: Any) -> None:
    """Run the step with some settings changed."""
    settings = {"role": Role.student_after, "evaluation_out": out / "evaluation"}
    config = {name: changes.pop(name) for name in changes.keys() & StepConfig.model_fields.keys()}
    main(model=model, data=data, config=json.dumps(SETTINGS | config), **(settings | changes))


def test_outputs(model: Path, data: Path, tmp_path: Path) -> None:
    write_record(model, lineage={"method": "skd"})
    run(model, data, tmp_path, label="skd-seed-1")
    evaluation = tmp_path / "evaluation"
    scores = json.loads((evaluation / "scores.json").read_text())
    predictions = read_predictions(evaluation / "predictions.jsonl")
    examples = PreparedData.load(data).test

    assert [row.id for row in predictions] == [example.id for example in examples]
    assert [row.target for row in predictions] == [example.target for example in examples]
    assert set(scores) == {"role", "label", "chrf", "bleu", "rougeL", "examples", "seconds", "model_uri", "data"}
    assert (scores["role"], scores["label"]) == ("student_after", "skd-seed-1")
    assert scores["examples"] == len(examples) == 12
    measured = measure("chrf", [row.prediction for row in predictions], [row.target for row in predictions])
    assert scores["chrf"]["score"] == pytest.approx(measured.score)
    assert scores["chrf"]["low"] <= scores["chrf"]["score"] <= scores["chrf"]["high"]
    assert scores["chrf"]["signature"] == measured.signature

    assert read_record(evaluation).lineage == {"method": "skd"}

    # Kubeflow keeps nothing of it but where it is: parameters and metadata are stored with every node of a run.
    output = json.loads((tmp_path / "executor_output.json").read_text())
    assert output["parameterValues"] == {}
    (artifact,) = output["artifacts"]["evaluation"]["artifacts"]
    assert artifact["metadata"] == {}


def test_same_seed_same_scores(model: Path, data: Path, tmp_path: Path) -> None:
    results = []
    for name, batch_size in (("first", 3), ("second", 12)):
        run(model, data, tmp_path / name, evaluation=CONFIG | {"batch_size": batch_size})
        scores = json.loads((tmp_path / name / "evaluation" / "scores.json").read_text())
        results.append({metric: scores[metric] for metric in TASK["metrics"]})
    assert results[0] == results[1]


def test_tracked(model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import MlflowClient

    monkeypatch.setenv("KFP_RUN_ID", "run-1")
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    run(model, data, tmp_path, tracking_uri=uri, experiment="tests")
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("tests")
    assert experiment is not None
    found = client.search_runs([experiment.experiment_id], "tags.`kfp.task` = 'evaluate-student_after'")
    assert len(found) == 1
    scores = json.loads((tmp_path / "evaluation" / "scores.json").read_text())
    assert found[0].info.status == "FINISHED"
    assert found[0].data.metrics["chrf"] == pytest.approx(scores["chrf"]["score"])
    assert found[0].data.metrics["rougeL_low"] == pytest.approx(scores["rougeL"]["low"])
    assert 0 <= found[0].data.metrics["truncated_fraction"] <= 1
    assert found[0].data.params["skd/role"] == "student_after"
    assert found[0].data.tags["signature.chrf"].startswith("chrF2|nrefs:1|")
    assert found[0].data.tags["precision"] == "fp32"
    assert found[0].inputs is not None
    assert found[0].inputs.dataset_inputs[0].dataset.name == "test"
    # A second attempt goes on in the same run, and logs the same table once.
    run(model, data, tmp_path, tracking_uri=uri, experiment="tests")
    run_id = found[0].info.run_id
    rows, table = sorted((file.path for file in client.list_artifacts(run_id)), key=len)
    assert rows == "predictions.jsonl"
    shown = json.loads(Path(client.download_artifacts(run_id, table)).read_text())
    assert shown["columns"] == [
        "id", "source", "target", "prediction", "chrf", "bleu", "rougeL", "tokens", "truncated"
    ]  # fmt: skip
    assert len(shown["data"]) == 12


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "skd_lib.steps.evaluate", *arguments]
    return subprocess.run(line, capture_output=True, text=True, env={**os.environ, "SKD_EVENTS": "1", "COLUMNS": "120"})


@pytest.mark.slow
def test_as_a_command(model: Path, data: Path, tmp_path: Path) -> None:
    done = command(
        "--model", str(model), "--data", str(data), "--role", "teacher", "--config", json.dumps(SETTINGS),
        "--evaluation-out", str(tmp_path / "e"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert '"done": 12, "total": 12' in done.stdout
    assert len(read_predictions(tmp_path / "e" / "predictions.jsonl")) == 12


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"evaluation": {"batchsize": 1}}, "--config, field `evaluation.batchsize`: unknown field"),
        ({"task": {"metrics": ["rouge"]}}, "--config, field `task.metrics.0`"),
        ({"data": Path("/nowhere")}, "the input `data` is gone from storage"),
        ({"model": Path("/nowhere")}, "the input `model` is gone from storage"),
        ({"task": {**TASK, "metrics": ["accuracy"]}}, "no reference holds an answer"),
    ],
)
def test_mistakes_are_named(model: Path, data: Path, tmp_path: Path, changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(SkdError) as caught:
        run(**({"model": model, "data": data, "out": tmp_path} | changes))
    assert complaint in str(caught.value)


def test_no_examples(model: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(SkdError, match="no predictions to score"):
        evaluate(load_model(model, device="cpu"), tiny_tokenizer, [], TaskConfig(), EvaluationConfig())


def test_help_is_quick_and_complete() -> None:
    done = command("--help")
    assert done.returncode == 0
    for option in ("--model", "--data", "--role", "--config", "--evaluation-out"):
        assert option in done.stdout


def test_surrogates_survive_the_whole_way(model: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    examples = [make_example("open \ufffd", "broken \ud800 target"), make_example("close", "the door")]
    config = EvaluationConfig(bootstrap_samples=100)
    result = evaluate(load_model(model, device="cpu"), tiny_tokenizer, examples, TaskConfig(max_new_tokens=3), config)
    assert result.scores.examples == 2
