"""The shape of the comparison's pipeline."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipelines.compiling import Documents
from pipelines.graph import count_steps, read_steps, unrolled
from skd_lib.compare.config import load_compare
from skd_lib.compare.plan import to_parameters

EXAMPLE = Path(__file__).parents[2] / "pipelines/configs/compare-demo.yaml"
BODY = ["compare_variant", "student_init", "distill", "evaluate-student_after", "specdec_benchmark", "compare_result"]
ONCE = ["preflight", "import_model", "prepare_data", "teacher_sft", "evaluate-teacher", "compare_table", "finish"]


@pytest.fixture(scope="module")
def documents(compile_once: Callable[..., Documents]) -> Documents:
    return compile_once(name="compare_methods")


def test_what_all_runs_share_is_made_once(documents: Documents):
    steps = read_steps(documents[0])
    assert sorted(step.name for step in steps if not step.loop) == sorted(ONCE)
    assert [step.name for step in steps if step.loop] == BODY
    assert {step.name for step in steps if not step.cached} == {"preflight", "compare_table", "finish"}
    (table,) = (step for step in steps if step.name == "compare_table")
    assert {"compare_result", "evaluate-teacher"} <= set(table.waits_for)


def test_table_is_given_one_file_a_run(documents: Documents):
    """Linux takes no argument of 128 KiB, and KFP's executor input, which is one, holds every parameter of a step."""
    table = documents[0]["components"]["comp-exit-handler-1"]["dag"]["tasks"]["compare-table"]["inputs"]
    (collected,) = (name for name, source in table["artifacts"].items() if "taskOutputArtifact" in source)
    assert collected == "results"
    from_loop = [name for name, source in table["parameters"].items() if "for-loop" in str(source)]
    assert from_loop == []


def test_rounds_of_the_loop_have_steps_of_their_own(documents: Documents):
    steps = unrolled(read_steps(documents[0]), ["a", "b"])
    names = [step.name for step in steps]
    assert len(names) == len(set(names)) == len({step.component for step in steps}) == count_steps(steps) == 19
    inside = [step for step in steps if step.loop]
    assert [step.name for step in inside] == [f"{name}-{round_}" for round_ in "ab" for name in BODY]
    assert [step.iteration for step in inside] == ["a"] * 6 + ["b"] * 6
    assert "distill-b" in inside[-1].waits_for
    assert not any(other.endswith("-a") for step in inside[6:] for other in step.waits_for)


def test_page_opens_with_the_example(documents: Documents):
    parameters = documents[0]["root"]["inputDefinitions"]["parameters"]
    assert all(definition.get("description") for definition in parameters.values())
    wanted = to_parameters(*load_compare(EXAMPLE), where=EXAMPLE.name)
    assert {name: parameters[name]["defaultValue"] for name in wanted} == wanted


def test_training_in_the_loop_is_retried_on_a_gpu_and_knows_its_run(documents: Documents):
    loop: dict[str, Any] = documents[0]["components"]["comp-for-loop-2"]["dag"]["tasks"]
    assert all("retryPolicy" in task for task in loop.values())
    executors = documents[0]["deploymentSpec"]["executors"]
    assert "accelerator" in executors["exec-distill"]["container"]["resources"]
    kubernetes = documents[1]["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    assert all(settings["fieldPathAsEnv"][0]["name"] == "KFP_RUN_ID" for settings in kubernetes.values())
