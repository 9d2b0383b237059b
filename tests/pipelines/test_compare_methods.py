"""A whole comparison on this machine, with tiny models: run, lose a run, extend."""

from __future__ import annotations

import csv
import itertools
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from mlflow import MlflowClient

from tests.conftest import SaveTinyModel

ROOT = Path(__file__).parents[2]
WORDS = {"chat": "cat", "chien": "dog", "mot": "word", "jour": "day", "main": "hand"}

pytestmark = pytest.mark.slow


@dataclass
class Workplace:
    """A comparison's file, with its base, data and models."""

    folder: Path

    @property
    def run(self) -> Path:
        return self.folder / "runs" / "tiny-compare"

    def write(self, **values: Any) -> Path:
        path = self.folder / "compare.yaml"
        path.write_text(yaml.safe_dump({"name": "tiny-compare", "base": "tiny.yaml", **values}))
        return path

    def complete(self, path: Path) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "skd_lib.cli", "compare", str(path), "--runs-dir", str(self.folder / "runs")],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "160"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=500,
        )
        assert done.returncode == 0, done.stdout
        return done.stdout


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory, save_tiny_model: SaveTinyModel) -> Workplace:
    folder = tmp_path_factory.mktemp("compare")
    save_tiny_model(folder / "teacher", layers=4)
    phrases = [" ".join(phrase) for phrase in itertools.permutations(WORDS, 3)]
    rows = [{"source": phrase, "target": " ".join(WORDS[word] for word in phrase.split())} for phrase in phrases]
    for split, part in {"train": rows[:36], "validation": rows[36:44], "test": rows[44:]}.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    training = {"batch_size": 8, "eval_steps": 4, "max_steps": 4, "learning_rate": 3e-3}
    base = {
        "name": "tiny",
        "teacher": str(folder / "teacher"),
        "data": {
            "source": {
                "type": "files",
                **{split: [str(folder / f"{split}.jsonl")] for split in ("train", "validation", "test")},
            },
            "near_duplicate_threshold": 1.0,
        },
        "task": {"stop": ["\n"], "max_prompt_tokens": 64, "max_new_tokens": 12},
        "teacher_sft": {"training": {**training, "max_steps": 8}},
        "student_init": {"mode": "prune", "keep_first": 1, "keep_last": 1},
        "distill": {"training": training},
        "evaluation": {"bootstrap_samples": 100},
    }
    (folder / "tiny.yaml").write_text(yaml.safe_dump(base))
    return Workplace(folder)


def test_comparison_loses_a_broken_variant_but_not_the_others(workplace: Workplace):
    # A learning rate at which the loss explodes at once; of the others, two methods with two seeds.
    broken = {"distill.training.learning_rate": 1e6, "distill.training.max_skipped_steps": 1}
    path = workplace.write(methods=["skd", "sft"], variants={"hot": {**broken, "distill.method": "sft"}}, seeds=[0, 1])
    output = workplace.complete(path)
    print(output)
