"""The memory that the paper's example says it takes is what preflight estimates."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from skd_lib.bench.setup import SHAPES
from skd_lib.config import load_config, parse_overrides
from skd_lib.planning.memory import GIB, config_size, estimates


def test_memory_that_the_papers_example_says_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    path = Path(__file__).parents[2] / "pipelines/configs/gemma-gsm8k.yaml"
    said = path.read_text(encoding="utf-8").partition("\nname:")[0]
    monkeypatch.setattr("skd_lib.models.precision.compute_dtype", lambda *_: torch.bfloat16)  # a GPU's
    models = [config_size(SHAPES[name]()) for name in ("gemma-7b", "gemma-2b")]

    def estimated(*changes: str) -> dict[str, str]:
        config = load_config(path, parse_overrides(changes))
        return {
            each.step: f"{each.total / GIB:.0f} GiB" for each in estimates(config, *models, device=torch.device("cuda"))
        }

    assert f"takes {estimated()['teacher_sft']} (teacher_sft; distill takes {estimated()['distill']})" in said
    several, one = re.findall(r"--set (\S+)`", said)
    assert load_config(path, parse_overrides([several])).teacher_sft.training.fsdp
    assert f"`--set {one}` ({estimated(one)['teacher_sft']})" in said
