"""A draft is made again only where the teacher accepts less of the champion on the new prompts."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from skd_kfp.pipelines.kubeflow.api import KubeflowPipelines
from skd_kfp.pipelines.kubeflow.submit import Target
from skd_kfp.pipelines.kubeflow.trigger import Trigger, reading_from
from skd_lib.config import RunConfig, parse_section
from skd_lib.errors import SkdError
from skd_lib.models.files import weights_digest
from skd_lib.specdec.benchmark import measure_references
from skd_lib.specdec.prompts import prompts_of_run
from skd_lib.tracking import registry
from tests.conftest import SaveTinyModel
from tests.kubeflow import small
from tests.kubeflow.fake_kfp import FakeKfp
from tests.kubeflow.test_submit import skd
from tests.tracking.conftest import empty_store, store

__all__ = ["empty_store", "store"]
SETTING = "transformers, 3 tokens drafted, temperature 0"
Register = Callable[..., None]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, save_tiny_model: SaveTinyModel) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for number, name in enumerate(("teacher", "champion")):
        save_tiny_model(folder / name, seed=number, layers=1)
    return folder


@pytest.fixture
def config(models: Path) -> RunConfig:
    values = {
        "name": "draft",
        "teacher": str(models / "teacher"),
        "student": "org/small",
        "data": {"source": {"type": "files", "train": ["{source}/log.jsonl"], "columns": {"answers": "ignore"}}},
        "task": {"max_prompt_tokens": 64, "max_new_tokens": 8},
        "teacher_sft": {"enabled": False},
        "specdec": {"examples": 4, "gamma": 3, "gammas": [3], "batch_sizes": [4], "temperatures": [0], "repeats": 1},
        "registry": {"model_name": "draft", "gate": "draft"},
    }
    return parse_section(RunConfig, values, where="test")


@pytest.fixture
def source(tmp_path: Path) -> str:
    """A folder of requests that is complete."""
    folder = tmp_path / "logs"
    folder.mkdir()
    rows = [{"messages": [{"role": "user", "content": f"Is {n} more than {7 * n % 11}?"}]} for n in range(60)]
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "_SUCCESS").touch()
    return str(folder)


@pytest.fixture
def register(models: Path, store: str) -> Register:
    """Registers the champion with its acceptance at the time."""

    def register(rate: float | None, drafted: str = SETTING) -> None:
        registry.register(
            tracking_uri=store,
            model_name="draft",
            student_uri=str(models / "champion"),
            weights_sha256=weights_digest(models / "champion"),
            run_id="",
            promote=True,
            figures={} if rate is None else {"acceptance_rate": rate},
            tags={registry.DRAFTED_TAG: drafted},
        )

    return register


@pytest.fixture
def trigger(api: KubeflowPipelines, config: RunConfig, store: str, tmp_path: Path) -> Trigger:
    claims = str(tmp_path / "claims")
    return Trigger(config, small.package(), Target(), api, claims=claims, tracking_uri=store, max_drop=0.1)


@pytest.fixture
def now(config: RunConfig, source: str, models: Path) -> float:
    """The champion's acceptance on the new prompts, measured apart from the trigger."""
    here = reading_from(config, source)
    inputs = prompts_of_run(here, limit=4)
    drafts = {"champion": str(models / "champion")}
    found = measure_references(
        here.teacher, drafts, inputs, task=here.task, config=here.specdec.headline(), seed=here.seed
    )
    return found["champion"].acceptance_rate


def test_without_a_champion_new_data_is_enough(kfp: FakeKfp, trigger: Trigger, source: str) -> None:
    decision = trigger.fire(source)
    assert decision.fire
    assert decision.reason == "there is no run for this data yet; draft has no champion yet"
    assert len(kfp.runs) == 1


def test_a_champion_of_which_nothing_was_accepted_is_replaced(
    trigger: Trigger, source: str, register: Register
) -> None:
    register(0.0)
    decision = trigger.explain(source)
    assert decision.fire
    assert decision.reason.endswith("the teacher accepted none of the champion's drafts (version 1)")


def test_a_run_starts_only_where_acceptance_has_fallen_by_more_than_the_share(
    kfp: FakeKfp, trigger: Trigger, source: str, register: Register, now: float
) -> None:
    assert 0 < now < 0.8
    register(now / 0.92)
    decision = trigger.fire(source)
    assert not decision.fire
    assert decision.reason == (
        f"the teacher accepts {now:.1%} of the champion's drafts (version 1), 8.0% less than the {now / 0.92:.1%} it "
        "had: not beyond the 10 % of --max-drop"
    )
    assert kfp.runs == []
    register(now / 0.85)
    assert trigger.explain(source).fire
    decision = trigger.fire(source)
    assert decision.fire
    assert decision.reason.startswith("there is no run for this data yet; the teacher accepts")
    assert decision.reason.endswith(f"15.0% less than the {now / 0.85:.1%} it had: beyond the 10 % of --max-drop")
    assert [run["run_id"] for run in kfp.runs] == [decision.run_id]
    assert trigger.fire(source).reason == "there is a run for this data already, pending"
    assert len(kfp.runs) == 1


def test_one_state_of_the_data_is_measured_once(
    trigger: Trigger, source: str, register: Register, now: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    register(now)
    first = trigger.fire(source)
    assert "0.0% more than" in first.reason

    def measure(*_: Any, **__: Any) -> Any:
        raise AssertionError("it is measured again")

    monkeypatch.setattr("skd_lib.specdec.benchmark.measure_references", measure)
    assert trigger.fire(source) == first
    with pytest.raises(AssertionError):
        replace(trigger, claims="").fire(source)


@pytest.mark.parametrize(
    ("rate", "drafted", "message"),
    [
        (None, SETTING, "does not say what share of its drafts the teacher accepted"),
        (0.5, "vllm, 3 tokens drafted, temperature 0", "registered with other settings than `specdec` has here"),
    ],
)
def test_figures_that_do_not_compare_are_an_error(
    kfp: FakeKfp, trigger: Trigger, source: str, register: Register, rate: float | None, drafted: str, message: str
) -> None:
    register(rate, drafted)
    with pytest.raises(SkdError, match=message):
        trigger.fire(source)
    assert kfp.runs == []


def test_a_teacher_that_the_run_trains_is_refused(trigger: Trigger, config: RunConfig, source: str) -> None:
    trained = config.model_copy(update={"teacher_sft": config.teacher_sft.model_copy(update={"enabled": True})})
    with pytest.raises(SkdError, match="the run trains its teacher"):
        replace(trigger, config=trained).explain(source)


def test_the_option_needs_a_registry(kfp: FakeKfp, config_file: Path, source: str) -> None:
    done = skd("trigger", source, "--config", config_file, "--host", kfp.host, "--max-drop", "0.1")
    assert isinstance(done.exception, SkdError)
    assert "give --tracking-uri" in str(done.exception)


def test_without_torch_the_option_is_refused_before_anything_is_asked(
    config_file: Path, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torch" else found(name))
    command = ["trigger", source, "--config", config_file, "--host", "http://127.0.0.1:9", "--max-drop", "0.1"]
    done = skd(*command, "--tracking-uri", "http://127.0.0.1:9")
    assert "--max-drop: teacher and champion decode here, and torch is not installed" in str(done.exception)
