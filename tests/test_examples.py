"""The examples, run as their first lines say, on tiny models."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.conftest import ROOT, SaveTinyModel

FOLDER = ROOT / "examples"


@pytest.fixture
def models(tmp_path: Path, save_tiny_model: SaveTinyModel) -> tuple[Path, Path]:
    return save_tiny_model(tmp_path / "teacher", seed=2, hidden=64), save_tiny_model(tmp_path / "student", seed=1)


def run(name: str, *arguments: str | Path) -> str:
    command = [sys.executable, str(FOLDER / name), *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.mark.slow
def test_the_training_loop_on_the_page(tmp_path: Path, models: tuple[Path, Path]) -> None:
    rows = [{"prompt": "Add 1 and 2: "}, {"messages": [{"role": "user", "content": "Add 3 and 4"}]}]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = [
        "--steps",
        3,
        "--batch-size",
        2,
        "--max-new-tokens",
        6,
        "--learning-rate",
        1e-2,
        "--output",
        tmp_path / "out",
    ]
    told = run("train_skd.py", *models, tmp_path / "data.jsonl", *options)
    assert told.count("tokens a teacher call") == 3
    before, after = (AutoModelForCausalLM.from_pretrained(folder) for folder in (models[1], tmp_path / "out"))
    assert not torch.equal(before.get_input_embeddings().weight, after.get_input_embeddings().weight)


@pytest.mark.slow
def test_a_method_and_a_rule_of_ones_own(tmp_path: Path, models: tuple[Path, Path]) -> None:
    (tmp_path / "data.jsonl").write_text("\n".join(json.dumps({"prompt": f"Add {n} and 2: "}) for n in range(8)))
    options = ["--steps", 2, "--batch-size", 2, "--max-new-tokens", 6, "--output", tmp_path / "out"]
    told = run("custom_method.py", *models, tmp_path / "data.jsonl", *options)
    assert told.count("tokens_per_teacher_call") == 1  # in the first half the teacher checks the drafts
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


@pytest.mark.slow
def test_speculative_decoding_says_what_the_teacher_says(models: tuple[Path, Path]) -> None:
    told = [run("speculative_decoding.py", models[0], one, "Add 12 and 30.", "--max-new-tokens", 12) for one in models]
    assert "100% of the drafted tokens stand" in told[0]
    assert told[0].splitlines()[:-1] == told[1].splitlines()[:-1]


@pytest.mark.slow
def test_mistakes_are_sentences(tmp_path: Path, models: tuple[Path, Path]) -> None:
    (tmp_path / "data.jsonl").write_text('{"prompt": "Add 1 and 2: "}\n{"prompt": \n')
    for name in ("train_skd.py", "custom_method.py"):
        told = failed(name, *models, tmp_path / "data.jsonl")
        assert f"{tmp_path / 'data.jsonl'}, row 2: broken JSON" in told
        assert "error: no-such-folder: no such folder" in failed(name, models[0], "no-such-folder", "data.jsonl")
    assert "error: no-such-folder: no such folder" in failed("speculative_decoding.py", "no-such-folder", "x", "Add 1.")


def failed(name: str, *arguments: str | Path) -> str:
    done = subprocess.run([sys.executable, str(FOLDER / name), *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    return done.stderr


def test_the_readmes_python(tmp_path: Path, models: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its block as it is, but for the models' names and the number of steps."""
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"Add {n} and 2: ", "completion": f"{n + 2}"} for n in range(16)]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    text = (ROOT / "README.md").read_text()
    (block,) = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    names = {
        "Qwen/Qwen2.5-1.5B-Instruct": "teacher",
        "Qwen/Qwen2.5-0.5B-Instruct": "student",
        "=500": "=1, report_to='none'",
    }
    for old, new in names.items():
        assert old in block
        block = block.replace(old, new)
    variables: dict[str, Any] = {}
    exec(block, variables)  # noqa: S102 - our own text
    assert variables["trainer"].state.global_step == 1


@pytest.mark.slow
def test_the_pages_python(tmp_path: Path, models: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """All its blocks, from top to bottom, with tiny models where the demo leaves its own."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/demo").mkdir(parents=True)
    for folder in models:
        (tmp_path / "runs/demo" / folder.name).symlink_to(folder)
    text = (ROOT / "docs/guides/python.md").read_text()
    variables: dict[str, Any] = {}
    for block in re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        exec(block, variables)  # noqa: S102 - our own text
    assert 0 < variables["share"] <= 1
    assert variables["loss"] > 0
    assert variables["best"] <= variables["before"]
    assert variables["measured"].speedup > 0


def test_the_loop_fits_on_a_page() -> None:
    assert len((FOLDER / "train_skd.py").read_text().splitlines()) <= 120
