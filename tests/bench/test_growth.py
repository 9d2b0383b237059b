"""The growth benchmark on tiny models: every axis is walked, and K acts through the acceptance alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from benchmark import app
from growth import AXES, OWN_K
from skd_lib.bench.setup import SHAPES
from tests.conftest import CONFIGS


@pytest.fixture
def tiny_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    size = {"vocab_size": 256, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    monkeypatch.setitem(SHAPES, "tiny", lambda: CONFIGS["llama"](num_hidden_layers=3, **size))


@pytest.mark.slow
@pytest.mark.usefixtures("tiny_shapes")
def test_every_axis_is_walked(tmp_path: Path) -> None:
    options = ["--teacher", "random:tiny", "--student", "random:tiny-2-layers", "--dtype", "float32", "--device", "cpu"]
    options += ["--batch-size", "4", "--new-tokens", "16", "--output", str(tmp_path / "growth.json")]
    done = CliRunner(env={"COLUMNS": "90"}).invoke(app, ["growth", *options])
    assert done.exit_code == 0, done.output
    points = json.loads((tmp_path / "growth.json").read_text())["points"]
    walked = {axis: [p["value"] for p in points if p["axis"] == axis] for axis in AXES}
    assert walked == {axis: list(values) for axis, values in AXES.items()}
    of = {(p["axis"], p["value"]): p["tokens_per_teacher_call"] for p in points}
    assert of["acceptance", 1.0] == pytest.approx(16 / 4)  # ceil(16 / 5) calls
    assert of["acceptance", 0.5] < of["acceptance", 0.7] < of["acceptance", 1.0]
    assert of["gamma", 1] == 1
    assert {of["K, own drafts", k] for k in OWN_K} == {16 / 4}
    assert all(p["tokens_per_second"] > 0 and p["round_seconds"] > 0 for p in points)
    assert "K, own drafts" in done.output
