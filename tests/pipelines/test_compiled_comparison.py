"""The shape of the comparison's pipeline."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from skd_kfp.pipelines.compiling import Documents
from skd_kfp.pipelines.graph import read_steps, unrolled

BODY = ["compare_variant", "student_init", "distill", "evaluate-student_after", "specdec_benchmark", "show-trial"]
ONCE = ["preflight", "prepare_data", "show-data", "teacher_sft", "evaluate_teacher", "compare_table", "finish"]


@pytest.fixture(scope="module")
def documents(compile_once: Callable[..., Documents]) -> Documents:
    return compile_once(name="compare_methods")


def test_what_all_trials_share_is_made_once(documents: Documents):
    steps = read_steps(documents[0])
    assert sorted(step.name for step in steps if not step.loop) == sorted(ONCE)
    assert sorted(step.name for step in steps if step.loop) == sorted(BODY)
    uncached = {"preflight", "show-data", "show-trial", "compare_variant", "compare_table", "finish"}
    assert {step.name for step in steps if not step.cached} == uncached
    (table,) = (step for step in steps if step.name == "compare_table")
    assert {"show-trial", "evaluate_teacher"} <= set(table.waits_for)


def test_table_is_given_files_of_each_trial(documents: Documents):
    """Linux takes no argument of 128 KiB, and KFP's executor input, which is one, holds every parameter of a step."""
    table = documents[0]["components"]["comp-compare"]["dag"]["tasks"]["compare-table"]["inputs"]
    collected = {name for name, source in table["artifacts"].items() if "taskOutputArtifact" in source}
    assert collected == {"evaluations", "drafts", "teacher_evaluations"}
    assert [name for name, source in table["parameters"].items() if "for-loop" in str(source)] == []


def test_rounds_of_the_loop_have_steps_of_their_own(documents: Documents):
    steps = unrolled(read_steps(documents[0]), ["a", "b"])
    names = [step.name for step in steps]
    expected = len(ONCE) + 2 * len(BODY)
    assert len(names) == len(set(names)) == len({step.component for step in steps}) == expected
    inside = [step for step in steps if step.loop]
    assert [step.iteration for step in inside] == ["a"] * len(BODY) + ["b"] * len(BODY)
    assert sorted(step.name for step in inside) == sorted(f"{name}-{round_}" for round_ in "ab" for name in BODY)
    assert "specdec_benchmark-b" in inside[-1].waits_for
    assert not any(other.endswith("-a") for step in inside[len(BODY) :] for other in step.waits_for)


def test_training_in_the_loop_is_retried_on_a_gpu_and_knows_its_run(documents: Documents):
    (loop,) = (part for name, part in documents[0]["components"].items() if name.startswith("comp-for-loop"))
    tasks: dict[str, Any] = loop["dag"]["tasks"]
    assert {name for name, task in tasks.items() if "retryPolicy" not in task} == {"compare-variant", "show-trial"}
    # Each trial's own label: equal steps side by side make artifacts of different ids, the keys of what follows.
    for name in ("student-init", "distill"):
        config = tasks[name]["inputs"]["parameters"]["config"]["taskOutputParameter"]
        assert config["producerTask"] == "compare-variant"
    executors = documents[0]["deploymentSpec"]["executors"]
    assert "accelerator" in executors["exec-distill"]["container"]["resources"]
    kubernetes = documents[1]["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    assert all(settings["fieldPathAsEnv"][0]["name"] == "KFP_RUN_ID" for settings in kubernetes.values())
