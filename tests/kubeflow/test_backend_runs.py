"""Runs of the compiled pipelines, from the start to what `finish` is told, on each supported version of Kubeflow."""

from __future__ import annotations

import math
from typing import Any

import pytest

from skd_kfp.pipelines.compiling import PIPELINES, compiled_path
from skd_lib._core.documents import parse_yaml_documents, read_text
from tests.kubeflow.backend import NEXT, V2_17, VERSIONS, Call, Made, Records, Run, StepFailed, StepKilled, Version
from tests.kubeflow.backend.steps import Steps

FORM = {"data_train": "gs://b/train.jsonl", "model_teacher": "org/large", "model_student": "org/small"}
COMPARISON = '{"methods": ["skd", "supervised_kd"], "seeds": [1, 2]}'


def documents(name: str) -> list[dict[str, Any]]:
    """The pipeline as it is compiled and kept."""
    return parse_yaml_documents(read_text(compiled_path(name)), where=name)


def form(name: str, **changes: Any) -> dict[str, Any]:
    """What a person fills in."""
    return {**FORM, **({"comparison": COMPARISON} if name == "compare_methods" else {}), **changes}


def run(name: str, steps: Steps | None = None, records: Records | None = None, **more: Any) -> Run:
    """Run a pipeline."""
    given = more.pop("given", form(name))
    return Run(records or Records(), documents(name), given, steps or Steps(), **more)


def fails(call: Call) -> Made:
    raise StepFailed("no such column: target")


def dies(call: Call) -> Made:
    raise StepKilled


@pytest.mark.parametrize("version", VERSIONS, ids=lambda version: version.name)
@pytest.mark.parametrize("name", PIPELINES)
def test_a_run_goes_through(name: str, version: Version) -> None:
    """Commit 9e44b4e: on 2.17.0 `parameter "trials" not found in executor input` in preflight's driver."""
    steps = Steps()
    result = run(name, steps, version=version)

    drivers = {node: phase for node, phase in result.nodes.items() if node.endswith("-driver")}
    assert (result.state, drivers) == ("SUCCEEDED", {})
    # Until 2.16 a nested pipeline's end is counted when a step beside it ends, which a distillation's last one does.
    counted = version.states_climb or name != "compare_methods"
    assert result.told["state"] == (version.complete if counted else "RUNNING")
    assert {"register-model"} & set(result.done) or "compare-table" in result.done


@pytest.mark.parametrize("name", PIPELINES)
def test_the_name_in_the_page_is_the_run_s(name: str) -> None:
    """The run's name is KFP's, also within nested pipelines."""
    steps = Steps()
    run(name, steps, run_name="Tuesday's run")
    told = {call.task: call.parameters["run_name"] for call in steps.calls if "run_name" in call.parameters}
    assert told["preflight"] == told["finish"] == "Tuesday's run"


@pytest.mark.parametrize("name", PIPELINES)
def test_node_pool_and_settings_reach_the_steps(name: str) -> None:
    result = run(name, given=form(name, node_selector={"pool": "mine"}, settings="team-settings"))
    assert result.pods["distill"]["node_selector"] == {"pool": "mine"}
    assert set(result.pods["distill"]["config_maps"]) == {"team-settings"}
    assert set(result.pods["finish"]["config_maps"]) == {"team-settings"}


def test_a_comparison_whose_field_is_cleared_has_a_table() -> None:
    """Kubeflow's page sends an empty text. As a single run it would train a teacher and stop."""
    result = run("compare_methods", given=form("compare_methods", comparison=""))
    assert "compare-table" in result.done


FAILURES = {"fails": (fails, "FAILED"), "dies": (dies, "RUNNING")}


@pytest.mark.parametrize("version", [V2_17, NEXT], ids=lambda version: version.name)
@pytest.mark.parametrize("how", FAILURES)
def test_a_step_that_does_not_succeed(how: str, version: Version) -> None:
    """A step that dies with its launcher (OOM, eviction) leaves the word RUNNING."""
    instead, word = FAILURES[how]
    result = run("distillation", Steps(instead={"distill": instead}), version=version)
    assert (result.state, result.told["state"]) == ("FAILED", word)
    assert bool(result.told["error"].get("message")) == (version is NEXT and how == "fails")
    assert "report" not in result.done  # nothing of what needs it is started
    assert result.states("finish") == [version.complete]


def test_a_driver_that_fails() -> None:
    """A step gave null: who reads it never starts, is Omitted, and `finish` is told RUNNING."""

    def gives_null(call: Call) -> Made:
        return Made({"measured": None})

    result = run("distillation", Steps(instead={"report": gives_null}))
    assert (result.state, result.told["state"]) == ("FAILED", "RUNNING")
    assert "got null for input parameter" in str(result.nodes)


def test_a_wrong_kind_of_value_in_the_form() -> None:
    """The exit handler's own driver refuses it: `finish` does not run either, and no message is shown."""
    result = run("distillation", given=form("distillation", training_steps="many"))
    assert (result.state, result.told) == ("FAILED", {})
    assert "type mismatch: expect NUMBER_INTEGER, got str" in str(result.nodes)


def test_a_cleared_name_of_the_settings() -> None:
    """KFP's drivers refuse an empty name of a ConfigMap: no step runs, not even `finish`."""
    result = run("distillation", given=form("distillation", settings=""))
    assert result.state == "FAILED"
    assert "Expected a non-empty string" in str(result.nodes)


def test_cancelled() -> None:
    """The running step is killed at once, `finish` runs and is told RUNNING."""
    result = run("distillation", cancel_at=45)
    assert (result.state, result.told["state"]) == ("FAILED", "RUNNING")
    assert "register-model" not in result.done


NONSENSE = {"a number that is none": math.nan, "infinity": math.inf}


@pytest.mark.parametrize("value", NONSENSE.values(), ids=NONSENSE)
def test_outputs_that_the_launcher_refuses(value: float) -> None:
    """The step is done when its launcher refuses what it gave: our steps write no such thing (`StepIO`)."""

    def reports(call: Call) -> Made:
        return Made({"measured": "{}"}, metadata={"figures": {"chrf": value}})

    result = run("distillation", Steps(instead={"report": reports}))
    assert result.states("report") == ["FAILED"]
    assert result.told["state"] == "FAILED"


def test_a_failed_attempt_before_a_good_one() -> None:
    """FAILED climbs up with the first attempt, and COMPLETE with the last."""
    tries: list[int] = []

    def second(call: Call) -> Made:
        tries.append(call.attempt)
        return fails(call) if call.attempt == 0 else Made()

    result = run(
        "distillation",
        Steps(instead={"distill": second}),
        retries=lambda task: task.get("retryPolicy", {}).get("maxRetryCount", 0),
    )
    assert tries == [0, 1]
    assert (result.state, result.told["state"], result.states("distill")) == ("SUCCEEDED", "COMPLETE", ["COMPLETE"])
