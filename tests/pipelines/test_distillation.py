"""The whole pipeline on this machine, with tiny models that really learn: run, run again, kill and resume."""

from __future__ import annotations

import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from mlflow import MlflowClient
from transformers import AutoModelForCausalLM, AutoTokenizer

from skd_kfp.pipelines.compiling import compile_pipeline
from skd_kfp.pipelines.graph import read_steps
from skd_lib.models.records import read_samples
from tests.conftest import SaveTinyModel

ROOT = Path(__file__).parents[2]
WORDS = {
    "chat": "cat",
    "chien": "dog",
    "fichier": "file",
    "mot": "word",
    "jour": "day",
    "nuit": "night",
    "main": "hand",
    "rue": "road",
}
STEPS = [
    "preflight", "prepare_data", "show-data", "teacher_sft", "student_init", "distill", "evaluate_teacher",
    "evaluate_student", "specdec_benchmark", "evaluate_champion", "report", "register_model", "finish",
]  # fmt: skip
UNCACHED = {"preflight", "show-data", "evaluate_champion", "report", "register_model", "finish"}
UNTRACKED = {"show-data", "finish"}

pytestmark = pytest.mark.slow


@dataclass
class Workplace:
    """A config with its data and models, and the runs made from it."""

    folder: Path
    config: Path

    @property
    def run(self) -> Path:
        return self.folder / "runs" / "tiny"

    @property
    def tracking_uri(self) -> str:
        return f"sqlite:///{self.folder}/runs/mlflow.db"

    def start(self) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [
                sys.executable,
                "-m",
                "skd_kfp.pipelines.cli",
                "run",
                str(self.config),
                "--runs-dir",
                str(self.folder / "runs"),
            ],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "120"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def complete(self) -> str:
        """Run to the end; what it printed."""
        process = self.start()
        output = process.communicate(timeout=500)[0]
        assert process.returncode == 0, output
        return output

    def summary(self) -> dict[str, Any]:
        return json.loads((self.run / "summary.json").read_text())


def rows(count: int, seed: int) -> list[dict[str, str]]:
    """Distinct phrases of four words and their word-by-word translations."""
    phrases = list(itertools.permutations(WORDS, 4))
    random.Random(seed).shuffle(phrases)
    return [
        {"question": " ".join(phrase), "answer": " ".join(WORDS[word] for word in phrase)} for phrase in phrases[:count]
    ]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory, save_tiny_model: SaveTinyModel) -> Workplace:
    folder = tmp_path_factory.mktemp("pipeline")
    save_tiny_model(folder / "teacher", layers=4, hidden=64)
    data = rows(300, seed=0)
    for split, part in {"train": data[:240], "validation": data[240:264], "test": data[264:]}.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    training = {"batch_size": 16, "eval_steps": 20, "lr_scheduler": "cosine"}
    config = {
        "name": "tiny",
        "teacher": str(folder / "teacher"),
        "data": {
            "source": {
                "type": "files",
                **{split: [str(folder / f"{split}.jsonl")] for split in ("train", "validation", "test")},
                "columns": {"source": "question", "target": "answer"},
            },
            "near_duplicate_threshold": 1.0,
        },
        "task": {"stop": ["\n"], "max_prompt_tokens": 64, "max_new_tokens": 24},
        "teacher_sft": {"training": {**training, "learning_rate": 3e-3, "max_steps": 120}},
        "student_init": {"mode": "prune", "keep_first": 1, "keep_last": 1},
        "distill": {"training": {**training, "learning_rate": 3e-3, "max_steps": 60, "eval_steps": 10}},
        "evaluation": {"bootstrap_samples": 100},
        "specdec": {"examples": 8, "gamma": 3, "gammas": [1, 3], "sweep": "best", "repeats": 1},
        "registry": {"model_name": "tiny-student"},
    }
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(config))
    return Workplace(folder, path)


@pytest.fixture(scope="module")
def first(workplace: Workplace) -> str:
    """The first run's output."""
    return workplace.complete()


def test_first_run_shows_the_table_and_where_things_are(workplace: Workplace, first: str):
    assert f"[{len(STEPS)}/{len(STEPS)}] finish: done" in first
    for shown in ("teacher base", "student after", "chrF", "BLEU"):
        assert shown in first
    assert f"mlflow ui --backend-store-uri {workplace.tracking_uri}" in first
    assert "Executing task" not in first
    for step in STEPS:
        assert (workplace.run / "logs" / f"{step}.log").is_file()


def test_summary_has_the_promised_shape_and_means_something(workplace: Workplace, first: str):
    summary = workplace.summary()
    assert summary["task_metric"] == "chrf"
    models = summary["models"]
    assert list(models) == ["teacher_base", "teacher", "student_before", "student_after"]
    assert all(scores.keys() == {"chrf", "bleu"} for scores in models.values())
    assert models["teacher"]["chrf"] > models["teacher_base"]["chrf"] + 20
    assert models["student_after"]["chrf"] > models["student_before"]["chrf"] + 10
    before, after = summary["specdec"]["before"], summary["specdec"]["after"]
    assert {"acceptance_rate", "tokens_per_teacher_call", "speedup"} <= before.keys()
    assert after["acceptance_rate"] > before["acceptance_rate"]
    assert after["tokens_per_teacher_call"] > before["tokens_per_teacher_call"]
    names = [step.name for step in read_steps(compile_pipeline()[0])]
    assert list(summary["seconds"]) == names
    assert summary["seconds"].keys() == set(STEPS)
    assert all(seconds > 0 for seconds in summary["seconds"].values())
    assert {sequence.step for sequence in read_samples(workplace.run / "samples.jsonl")} == {1, *range(10, 61, 10)}
    assert "Step 60: " in (workplace.run / "report.html").read_text(encoding="utf-8")


def test_student_loads_with_plain_transformers(workplace: Workplace, first: str):
    folder = Path(re.search(r"^student +(.+)$", first, re.MULTILINE)[1])
    assert folder == workplace.run / "student"
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.config.num_hidden_layers == 2
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        assert model(**tokenizer("chat", return_tensors="pt")).logits.isfinite().all()
    assert (folder / "README.md").is_file()


def test_mlflow_has_the_run_tree_and_the_registered_student(workplace: Workplace, first: str):
    client = MlflowClient(workplace.tracking_uri)
    experiment = client.get_experiment_by_name("skd")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    parents = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    assert len(parents) == 1
    assert parents[0].info.status == "FINISHED"
    assert parents[0].data.metrics["student_after/chrf"] == workplace.summary()["models"]["student_after"]["chrf"]
    children = {run.data.tags["kfp.task"]: run for run in runs if run is not parents[0]}
    assert children.keys() == set(STEPS) - UNTRACKED
    assert {run.data.tags["mlflow.parentRunId"] for run in children.values()} == {parents[0].info.run_id}
    assert {run.info.status for run in children.values()} == {"FINISHED"}
    steps = [metric.step for metric in client.get_metric_history(children["distill"].info.run_id, "train/loss")]
    assert steps == sorted(set(steps))
    version = client.get_model_version_by_alias("tiny-student", "champion")
    assert version.version == client.get_model_version_by_alias("tiny-student", "challenger").version
    assert {"teacher", "method", "data_fingerprint", "weights_sha256"} <= version.tags.keys()
    assert version.tags["method"] == "skd"
    assert Path(version.source.removeprefix("file://")).is_dir()


def test_running_again_reuses_what_has_not_changed(workplace: Workplace, first: str):
    before = workplace.summary()
    output = workplace.complete()
    for step in STEPS:
        assert (f"{step}: unchanged, reused" in output) == (step not in UNCACHED)
    after = workplace.summary()
    assert without_seconds(after) == without_seconds(before)
    reused = [step for step in STEPS if step not in UNCACHED]
    assert [after["seconds"][step] for step in reused] == [before["seconds"][step] for step in reused]
    client = MlflowClient(workplace.tracking_uri)
    assert len(client.search_model_versions("name = 'tiny-student'")) == 1
    experiment = client.get_experiment_by_name("skd")
    assert len(client.search_runs([experiment.experiment_id])) == 1 + len(set(STEPS) - UNTRACKED)  # with the parent


def test_killed_in_distill_and_run_again_ends_with_the_same_table(workplace: Workplace, first: str):
    before = workplace.summary()
    forget(workplace, step="distill", output="distilled_student")
    process = workplace.start()
    wait_for_checkpoint(workplace.run / "checkpoints" / "distill", process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    log = workplace.run / "logs" / "distill.log"
    assert "60/60" not in log.read_text(), "distill was through before it could be killed: give it more steps"
    output = workplace.complete()
    assert "teacher_sft: unchanged, reused" in output
    assert "distill: done" in output
    assert re.search(r"distill goes on from .*checkpoint-\d+", log.read_text())
    after = workplace.summary()
    assert after["models"] == before["models"]
    for moment in ("before", "after"):
        for figure in ("acceptance_rate", "tokens_per_teacher_call"):
            assert after["specdec"][moment][figure] == before["specdec"][moment][figure]
    clock = ("seconds", "validation_seconds", "peak_bytes")
    told = [{k: v for k, v in s["course"].items() if k not in clock} for s in (after, before)]
    assert told[0] == told[1]
    client = MlflowClient(workplace.tracking_uri)
    assert len(client.search_model_versions("name = 'tiny-student'")) == 1  # the same weights to the bit


def test_another_k_is_measured_against_the_champion(workplace: Workplace, first: str):
    config = yaml.safe_load(workplace.config.read_text())
    config["distill"]["sampling"] = {"top_k": 1}
    workplace.config.write_text(yaml.safe_dump(config))
    output = workplace.complete()
    for step in ("prepare_data", "teacher_sft", "student_init", "evaluate_teacher"):
        assert f"{step}: unchanged, reused" in output
    for step in ("distill", "evaluate_student", "evaluate_champion"):
        assert f"{step}: done" in output
    told = output.splitlines()[-1]
    assert told.startswith("registered as tiny-student version 2 (")
    score = workplace.summary()["models"]["student_after"]["chrf"]
    assert re.search(
        rf"promoted: chrf {score:.2f} against [\d.]+ of the champion \(version 1\): .*; as draft [\d.]+x", told
    )
    client = MlflowClient(workplace.tracking_uri)
    assert len(client.search_model_versions("name = 'tiny-student'")) == 2


def without_seconds(summary: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in summary.items() if key != "seconds"}


def forget(workplace: Workplace, *, step: str, output: str) -> None:
    """Make a finished step one that has to run again."""
    entries = [path for path in (workplace.run / ".cache").glob("*.json") if output in json.loads(path.read_text())]
    assert len(entries) == 1
    entries[0].unlink()
    assert not list((workplace.run / "checkpoints" / step).glob("*/*/checkpoint-*"))  # removed by the finished step


def wait_for_checkpoint(folder: Path, process: subprocess.Popen[str], seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not list(folder.glob("*/*/checkpoint-*/complete")):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end, "no checkpoint was written"
        time.sleep(0.02)
