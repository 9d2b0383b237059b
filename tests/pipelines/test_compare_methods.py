"""A whole comparison on this machine, with tiny models: two methods, two seeds."""

from __future__ import annotations

import csv
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from mlflow import MlflowClient

from skd_lib.comparison.table import Comparison
from tests.conftest import SaveTinyModel

ROOT = Path(__file__).parents[2]
WORDS = {"chat": "cat", "chien": "dog", "mot": "word", "jour": "day", "main": "hand"}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, save_tiny_model: SaveTinyModel) -> Path:
    """A comparison's file, with its base, data and models; it has been run."""
    folder = tmp_path_factory.mktemp("compare")
    save_tiny_model(folder / "teacher", layers=4)
    phrases = [" ".join(phrase) for phrase in itertools.permutations(WORDS, 3)]
    rows = [{"source": phrase, "target": " ".join(WORDS[word] for word in phrase.split())} for phrase in phrases]
    splits = {"train": rows[:36], "validation": rows[36:44], "test": rows[44:]}
    for split, part in splits.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    training = {"batch_size": 8, "eval_steps": 4, "max_steps": 4, "learning_rate": 3e-3}
    base = {
        "name": "tiny",
        "teacher": str(folder / "teacher"),
        "data": {
            "source": {"type": "files", **{split: [str(folder / f"{split}.jsonl")] for split in splits}},
            "near_duplicate_threshold": 1.0,
        },
        "task": {"stop": ["\n"], "metrics": ["chrf"], "max_prompt_tokens": 64, "max_new_tokens": 12},
        "teacher_sft": {"training": training},
        "student_init": {"mode": "prune", "keep_first": 1, "keep_last": 1},
        "distill": {"training": training},
        "evaluation": {"bootstrap_samples": 100},
    }
    comparison = {"name": "tiny-compare", "base": "tiny.yaml", "methods": ["skd", "sft"], "seeds": [0, 1]}
    for name, values in {"tiny": base, "compare": comparison}.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(values))
    runs = str(folder / "runs")
    done = subprocess.run(
        [sys.executable, "-m", "skd_kfp.pipelines.cli", "compare", str(folder / "compare.yaml"), "--runs-dir", runs],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "160"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (folder / "output").write_text(done.stdout)
    return folder


def test_everything_runs_once_and_initial_students_are_shared(folder: Path):
    output = (folder / "output").read_text()
    assert "comparison tiny-compare: 4 runs, 31 steps" in output
    assert "[31/31] finish: done" in output
    for seed in (0, 1):
        assert f"student_init-skd-seed-{seed}: done" in output
        assert f"student_init-sft-seed-{seed}: unchanged, reused" in output
    for shown in ("minus skd", "chrF", "(teacher)", "What a run cost", "mlflow ui --backend-store-uri"):
        assert shown in output


def test_table_has_means_tests_and_costs(folder: Path):
    text = (folder / "runs/tiny-compare/comparison.json").read_text()
    comparison = Comparison.model_validate_json(text)
    skd, sft = comparison.variants
    assert [skd.variant, sft.variant, comparison.reference] == ["skd", "sft", "skd"]
    assert (skd.runs, skd.failed, skd.scores["chrf"].kind) == (2, 0, "t over seeds")
    assert (sft.tests["chrf"].examples, sft.tests["chrf"].seeds) == (16, 2)
    assert skd.costs["steps"] == sft.costs["steps"] == 4
    assert 0 < skd.costs["rejection_rate"] <= 1
    assert "rejection_rate" not in sft.costs
    assert skd.costs["teacher_tokens"] > sft.costs["teacher_tokens"] == 0
    assert skd.costs["student_tokens"] > sft.costs["student_tokens"] > sft.costs["response_tokens"] > 0
    assert comparison.teacher["chrf"].score > 0
    rows = list(csv.DictReader((folder / "runs/tiny-compare/runs.csv").open()))
    assert [(row["variant"], row["seed"]) for row in rows] == [("skd", "0"), ("skd", "1"), ("sft", "0"), ("sft", "1")]
    page = (folder / "runs/tiny-compare/comparison.html").read_text(encoding="utf-8")
    for shown in ("ChrF against tokens", "Validation loss against time (forward_kl)"):
        assert shown in page
    mean = sum(float(row["chrf"]) for row in rows[:2]) / 2
    assert skd.scores["chrf"].mean == pytest.approx(mean)


def test_mlflow_has_one_parent_and_a_run_for_every_step(folder: Path):
    client = MlflowClient(f"sqlite:///{folder}/runs/mlflow.db")
    (experiment,) = client.search_experiments(filter_string="name = 'skd'")
    runs = client.search_runs([experiment.experiment_id])
    (parent,) = (run for run in runs if "mlflow.parentRunId" not in run.data.tags)
    assert parent.info.status == "FINISHED"
    assert parent.data.metrics["skd/chrf"] >= 0
    assert {artifact.path for artifact in client.list_artifacts(parent.info.run_id)} == {
        *("comparison.html", "comparison.md", "runs.csv", "comparison.json")
    }
    labels = [f"{method}-seed-{seed}" for method in ("skd", "sft") for seed in (0, 1)]
    assert sorted(run.data.tags["kfp.task"] for run in runs if run is not parent) == sorted(
        ["preflight", "prepare_data", "teacher_sft", "evaluate_teacher", "compare_table"]
        + ["student_init-skd-seed-0", "student_init-skd-seed-1"]
        + [f"{step}-{label}" for step in ("distill", "evaluate-student_after") for label in labels]
    )
