"""Every figure that a training step can log is explained in docs/guides/tracking.md."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel

from skd_lib.results import Specdec
from skd_lib.sampling.samples import SamplingStatistics
from skd_lib.steps.trained_model import grouped, log_outcome
from skd_lib.steps.training_run import result_figures
from skd_lib.training.figures import PEAK_BYTES, sampling_figures
from tests.support.logged import DOCUMENTED, undocumented
from tests.training.tiny_task import run


class Recorder:
    """Keeps the names that a step logs to MLflow."""

    def __init__(self) -> None:
        self.names: set[str] = set()

    def log_metrics(self, metrics: Mapping[str, float], *, step: int | None = None) -> None:
        self.names |= set(metrics)

    def set_tags(self, tags: Mapping[str, Any]) -> None:
        pass


def test_a_training(tiny_model: Callable[..., PreTrainedModel], tmp_path: Path) -> None:
    recorder = Recorder()

    def keep(step: int, figures: dict[str, float]) -> None:
        recorder.log_metrics(grouped(figures), step=step)

    result = run(tiny_model(seed=1), tiny_model(seed=2), tmp_path, on_metrics=keep, max_steps=2, eval_steps=1)
    phases = {name.removeprefix("time/") for name in recorder.names if name.startswith("time/")}
    assert {name.partition("/")[0] for name in recorder.names} == {"train", "validation", "time"}
    assert phases == {"rollout", "loss", "optimiser", "validation", "checkpoint"}
    log_outcome(recorder, result_figures(result), {}, "")  # type: ignore[arg-type]
    assert {
        "train/teacher_entropy",
        "validation/loss",
        "final/student_tokens",
        "final/rejection_rate_last_tenth",
    } <= recorder.names
    assert undocumented(recorder.names) == set()
    assert undocumented(grouped({PEAK_BYTES + phase: 1.0 for phase in phases})) == set()  # of a GPU


def test_sampling() -> None:
    figures = sampling_figures(SamplingStatistics(sequences=1, tokens=2, tested=1, teacher_calls=1))
    assert len(figures) > 3
    assert undocumented(grouped(figures)) == set()


def test_a_draft() -> None:
    numbers = {name for name, field in Specdec.model_fields.items() if not isinstance(field.default, list)}
    given = dict.fromkeys(numbers - {"latency", "teacher_only_latency", "engine", "served", "vllm"}, 1)
    figures = Specdec.model_validate({**given, "acceptance_by_position": [0.5]}).metrics()
    assert {"ties", "best_gamma", "acceptance_position_1"} <= set(figures)
    assert undocumented(figures) == set()


@pytest.mark.parametrize("name", ["unheard_of", "train/unheard_of", "final/unheard_of_first_tenth"])
def test_a_name_that_is_not_explained_is_found(name: str) -> None:
    assert undocumented([name, "train/loss"]) == {name}
    assert "final/NAME_last_tenth" in DOCUMENTED
