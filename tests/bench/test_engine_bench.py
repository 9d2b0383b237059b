"""The benchmark of the engines: its figures and its command line; tests/vllm runs it with a server."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from skd_kfp.pipelines.cli import app
from skd_lib.bench.engine import PHASES, Result, Turn
from skd_lib.bench.setup import Settings
from skd_lib.errors import SkdError


def turn(engine: str, signal: str, *passes: tuple[float, ...]) -> Turn:
    seconds = [list(taken) for taken in zip(*passes, strict=True)]
    phases = PHASES if len(seconds) > 1 else ("sampling",)
    return Turn(engine, 4, 10, signal, lambda _: {}, seconds=dict(zip(phases, seconds, strict=True)))


def test_ratios_are_medians_of_passes_side_by_side() -> None:
    own = turn("transformers", "states", (2.0,), (20.0,), (4.0,))
    fast = turn("vllm", "states", (1.0,), (10.0,), (1.0,))
    step = turn("transformers", "", (0.0, 3.0, 4.0, 1.0), (0.0, 1.0, 1.0, 2.0), (0.0, 6.0, 2.0, 2.0))
    served = turn("vllm", "", (1.0, 1.0, 1.0, 1.0), (1.0, 1.0, 1.0, 1.0), (1.0, 1.0, 1.0, 1.0))
    result = Result(Settings(), {}, [own, fast, step, served])
    assert own.tokens_per_second == 40 / 4
    assert result.speedup(fast) == 2
    assert result.speedup(own) == 1
    assert result.speedup(served) == 2
    assert step.share("sampling") == pytest.approx(3 / 8)
    assert step.share("weights") == 0
    sampling, steps = result.tables()
    assert [row[0] for row in sampling.rows] == ["4 x 10, states: transformers", "4 x 10, states: vllm"]
    assert steps.rows[1][1:] == ["10.0", "2.00", "25%", "25%", "25%", "25%"]
    values = result.to_dict()
    assert [len(values[part]) for part in ("sampling", "training_steps")] == [2, 2]
    assert values["training_steps"][1]["shares"]["loss"] == 0.25


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [("--signals", "states,all", "no signal is called `all`"), ("--batch-sizes", "8,0", "not `8,0`")],
)
def test_mistakes_are_named(option: str, value: str, said: str) -> None:
    failed = CliRunner().invoke(app, ["bench", "engine", "teacher", "student", option, value])
    assert isinstance(failed.exception, SkdError)
    assert said in str(failed.exception)
    assert option in str(failed.exception)
