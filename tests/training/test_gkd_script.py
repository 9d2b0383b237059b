"""A script for TRL's `GKDTrainer` trains by SKD when two names are changed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from skd_lib.storage.cache import default_cache_dir
from skd_lib.storage.environments import Tool, make_environment
from tests.conftest import ROOT, SaveTinyModel

SCRIPT = Path(__file__).with_name("gkd_script.py")
IMPORT = "from trl.experimental.gkd import GKDConfig, GKDTrainer"


@pytest.mark.parametrize(
    "whose",
    [pytest.param("trl", marks=[pytest.mark.trl, pytest.mark.slow]), pytest.param("skd", marks=pytest.mark.slow)],
)
def test_the_script_runs(whose: str, tmp_path: Path, save_tiny_model: SaveTinyModel) -> None:
    folders = [save_tiny_model(tmp_path / "teacher", seed=2), save_tiny_model(tmp_path / "student", seed=1)]
    text, python = SCRIPT.read_text(), Path(sys.executable)
    if whose == "trl":
        pins = (ROOT / "constraints/trl.txt").read_text()
        python = make_environment(Tool("trl", "TRL", "trl"), pins, default_cache_dir())
    else:
        text = text.replace(IMPORT, "from skd_lib import SKDConfig, SKDTrainer").replace("GKD", "SKD")
    (tmp_path / "script.py").write_text(text)
    done = subprocess.run(
        [python, tmp_path / "script.py", *folders, tmp_path / "out"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "steps 2 True"
    before, after = (AutoModelForCausalLM.from_pretrained(folder) for folder in (folders[1], tmp_path / "out"))
    assert not torch.equal(before.get_input_embeddings().weight, after.get_input_embeddings().weight)
