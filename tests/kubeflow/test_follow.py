"""Following a run: what is said of its steps, and of its end, by what Kubeflow's record really holds."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest

from skd_kfp.pipelines.compiling import PIPELINES, compiled_path
from skd_kfp.pipelines.graph import read_steps
from skd_kfp.pipelines.kubeflow.api import KubeflowPipelines
from skd_kfp.pipelines.kubeflow.follow import Followed, ending, follow
from skd_kfp.pipelines.kubeflow.states import StepState, node_id, read_states
from skd_kfp.pipelines.kubeflow.submit import Package, Submission, Target
from skd_lib.config import RunConfig
from tests.kubeflow import small
from tests.kubeflow.fake_argo import FakeWorkflow
from tests.kubeflow.fake_kfp import API, RUNS, FakeKfp, Fault
from tests.kubeflow.test_submit import submit

OLD, NEW = "exit-handler-1.teacher.evaluate", "exit-handler-1.students.evaluate"
MODEL = "exit-handler-1.teacher.import-model"


def workflow(outcomes: dict[str, str] | None = None, loop: bool = False, **more: Any) -> FakeWorkflow:
    return FakeWorkflow(small.package(loop).documents[0], outcomes or {}, **more)


def record(state: str, *workflows: FakeWorkflow, history: tuple[str, ...] = ()) -> dict[str, Any]:
    """A run as the API tells of it."""
    tasks = [task for each in workflows for task in each.tasks()]
    told = [{"state": each, "update_time": "2026-01-01T00:00:00+00:00"} for each in (*history, state)]
    return {"state": state, "state_history": told, "run_details": {"task_details": tasks}}


def states_of(*workflows: FakeWorkflow) -> dict[str, StepState]:
    body = json.dumps({"run_id": "r", **record("RUNNING", *workflows)})
    run = API.deserialize(SimpleNamespace(data=body), "V2beta1Run")
    run.tasks = []
    spec = workflows[0].spec
    return {state.name: state for state in read_states(run, spec, read_steps(spec))}


def followed(kfp: FakeKfp, api: KubeflowPipelines, demo: RunConfig, course: list[dict[str, Any]], loop: bool = False):
    """What is said of a run that goes so, line by line, and how it ends."""
    package = small.package(loop)
    submission = Submission.plan(demo, package, Target(), name="a-run")
    run = submission.start(api, submission.prepare(api))
    kfp.course = course
    lines: list[str] = []
    spec = package.documents[0]
    end = follow(api, run.run_id, spec, read_steps(spec), lines.append, poll=0.01)
    return lines, end


def test_argos_ids_are_fnv_1a():
    """Test vectors of the hash's authors (draft-eastlake-fnv)."""
    vectors = {"": 0x811C9DC5, "a": 0xE40C292C, "foobar": 0xBF9CF968}
    assert {text: int(node_id("w", text).removeprefix("w-")) for text in vectors} == vectors


@pytest.mark.parametrize("wrapped", [False, True], ids=["plain", "a retry strategy for every template"])
def test_steps_of_equal_names_are_told_apart(wrapped: bool):
    states = states_of(workflow({OLD: "retried", NEW: "cached", f"{NEW}-2": "failed"}, wrapped=wrapped))
    told = {name: (state.state, state.attempts) for name, state in states.items()}
    assert told == {
        "preflight": ("SUCCEEDED", int(wrapped)),
        "import_model": ("SUCCEEDED", 1),
        "evaluate-teacher": ("SUCCEEDED", 2),
        "evaluate-tuned": ("SUCCEEDED", 1),
        "evaluate-before": ("REUSED", 0),
        "evaluate-after": ("FAILED", 3),
        "finish": ("SUCCEEDED", int(wrapped)),
    }


@pytest.mark.parametrize("name", PIPELINES)
def test_every_step_of_our_pipelines_is_known(name: str):
    argo = FakeWorkflow(Package.read(compiled_path(name)).documents[0], wrapped=True, rounds=3)
    found = {state.partition(" (")[0] for state in states_of(argo)}
    assert found == {step.name for step in read_steps(argo.spec)}


@pytest.mark.parametrize("wrapped", [False, True])
def test_pods_are_real_ones(wrapped: bool):
    argo = workflow({NEW: "failed", OLD: "driver"}, wrapped=wrapped)
    failed = states_of(argo)
    mark = "(0)" if wrapped else ""
    inside = f"{argo.name}{mark}.root{mark}.exit-handler-1{mark}"
    driver = f"{inside}.teacher{mark}.evaluate-driver{mark}"
    assert failed["evaluate-teacher"].driver
    assert failed["evaluate-teacher"].pod == argo.pod("system-container-driver", driver)
    argo = workflow({NEW: "failed"}, wrapped=wrapped)
    last = f"{inside}.students{mark}.evaluate{mark}.executor(2)"
    assert last in argo.nodes
    assert states_of(argo)["evaluate-before"].pod == argo.pod("retry-system-container-impl", last)


def test_what_follows_a_failed_driver_has_not_failed():
    states = states_of(workflow({MODEL: "driver"}))
    assert {name: state.state for name, state in states.items()} == {
        "preflight": "SUCCEEDED",
        "import_model": "FAILED",
        "finish": "SUCCEEDED",
    }


def test_a_drivers_failure_for_a_whole_pipeline_is_told():
    states = states_of(workflow({"exit-handler-1.students": "driver"}))
    assert (states["students"].state, states["students"].driver) == ("FAILED", True)


def test_a_step_whose_condition_does_not_hold_is_not_reused():
    assert states_of(workflow({MODEL: "condition"}))["import_model"].state == "SKIPPED"


def test_a_run_is_followed_to_its_end(kfp: FakeKfp, api: KubeflowPipelines, demo: RunConfig):
    kfp.faults = [Fault("GET", f"{RUNS}/.*", 502)]
    lines, end = followed(
        kfp,
        api,
        demo,
        [
            {"state": "PENDING"},
            record("RUNNING", workflow({"exit-handler-1.preflight": "running"})),
            record("RUNNING", workflow({MODEL: "cached", OLD: "running", f"{OLD}-2": "running"})),
            record("SUCCEEDED", workflow({MODEL: "cached"})),
        ],
    )
    assert lines == [
        "[1/7] preflight ...",
        "[1/7] preflight: done in 1 min 00 s",
        "[2/7] import_model: unchanged, reused",
        "[3/7] evaluate-teacher ...",
        "[3/7] evaluate-tuned ...",
        "[3/7] evaluate-teacher: done in 1 min 00 s",
        "[4/7] evaluate-tuned: done in 1 min 00 s",
        "[5/7] evaluate-before: done in 1 min 00 s",
        "[6/7] evaluate-after: done in 1 min 00 s",
        "[7/7] finish: done in 1 min 00 s",
    ]
    assert ending(end, "") == ["the run succeeded"]


def test_rounds_of_a_loop_are_counted(kfp: FakeKfp, api: KubeflowPipelines, demo: RunConfig):
    lines, _ = followed(kfp, api, demo, [record("SUCCEEDED", workflow(loop=True, rounds=3))], loop=True)
    assert "evaluate-trial (iteration 3): done in 1 min 00 s" in " ".join(lines)
    assert lines[-1].startswith("[10/10] ")
    done, total = zip(*(line[1:].partition("]")[0].split("/") for line in lines), strict=True)
    assert all(int(one) <= int(all_) for one, all_ in zip(done, total, strict=True))


def test_a_workflow_that_starts_again_is_not_counted_twice(kfp: FakeKfp, api: KubeflowPipelines, demo: RunConfig):
    """The administrator gave templates a retry strategy meanwhile: other nodes, and the first ones' tasks stay."""
    first = workflow({OLD: "running"})
    second = workflow({"exit-handler-1.preflight": "running"}, wrapped=True, began=1000)
    third = workflow(wrapped=True, began=1000)
    lines, end = followed(
        kfp, api, demo, [record("RUNNING", first), record("RUNNING", first, second), record("SUCCEEDED", first, third)]
    )
    assert "preflight again ..." in " ".join(lines)
    assert lines[-1] == "[7/7] finish: done in 1 min 00 s"
    assert all(int(line[1]) <= 7 for line in lines)
    assert ending(end, "") == ["the run succeeded"]


def test_a_failed_step_is_named_with_its_last_attempts_pod(kfp: FakeKfp, api: KubeflowPipelines, demo: RunConfig):
    argo = workflow({NEW: "failed"})
    _, end = followed(kfp, api, demo, [record("FAILED", argo)])
    whole, part = ending(end, "team")
    assert whole == "the run ended as FAILED"
    assert part.startswith("evaluate-before failed in attempt 3 after 3 min 00 s; its log: `kubectl logs -n team ")
    assert "-retry-system-container-impl-" in part


def test_a_cancelled_run_is_said_to_be_so(kfp: FakeKfp):
    kfp.course = [record("FAILED", workflow({OLD: "failed"}), history=("RUNNING", "CANCELING"))]
    done = submit(kfp, "--wait")
    assert done.exit_code == 3
    assert "the run was cancelled\n- stopped: evaluate-teacher\n" in done.output
    assert "error" not in done.output


def test_a_cancellation_that_the_history_lost_was_seen(kfp: FakeKfp, api: KubeflowPipelines, demo: RunConfig):
    course = [{"state": "CANCELING"}, record("FAILED", workflow({OLD: "failed"}), history=("RUNNING",))]
    _, end = followed(kfp, api, demo, course)
    assert ending(end, "")[0] == "the run was cancelled"


def test_the_commands_exit_code_is_the_runs(kfp: FakeKfp):
    kfp.course = [{**record("FAILED", workflow({MODEL: "driver"})), "error": {"message": "why"}}]
    done = submit(kfp, "--wait")
    assert done.exit_code == 1
    assert "error: the run ended as FAILED: why\n- import_model was not started: Kubeflow's driver" in done.output
    kfp.course = [record("SUCCEEDED", workflow())]
    done = submit(kfp, "--wait")
    assert done.exit_code == 0
    assert done.output.endswith("the run succeeded\n")


@pytest.mark.parametrize("state", ["SUCCEEDED", "FAILED"])
def test_a_record_that_has_grown_too_large_is_said(kfp: FakeKfp, api: KubeflowPipelines, demo: RunConfig, state: str):
    """Above 1 MiB Argo compresses the nodes, and Kubeflow shows the last steps as running for ever."""
    _, end = followed(kfp, api, demo, [record(state, workflow({NEW: "running", f"{NEW}-2": "running"}))])
    said = " ".join(ending(end, ""))
    assert "its record has grown beyond 1 MiB; not known to have ended: evaluate-before, evaluate-after" in said
    assert ("look at `kubectl get pods -n kubeflow -l pipeline/runid=" in said) == (state == "FAILED")


def test_without_a_failed_step_no_pod_is_made_up(kfp: FakeKfp, api: KubeflowPipelines, demo: RunConfig):
    _, end = followed(kfp, api, demo, [{"state": "FAILED"}])
    assert isinstance(end, Followed)
    assert ending(end, "")[1].startswith("Kubeflow names no step that failed: look at `kubectl get pods")


def later(scope: str, state: str, **more: Any) -> dict[str, Any]:
    """A task as the version without MLMD tells of it."""
    times = {"create_time": "2026-01-01T00:00:00Z", "end_time": "2026-01-01T00:02:00Z"}
    return {
        "task_id": scope,
        "scope_path": f"root.exit-handler-1.{scope}",
        "state": state,
        "type": "RUNTIME",
        **times,
        **more,
    }


def test_the_version_without_mlmd_is_read(kfp: FakeKfp, api: KubeflowPipelines, demo: RunConfig):
    pods = [{"name": "d", "type": "DRIVER"}, {"name": "e-1", "type": "EXECUTOR"}, {"name": "e-2", "type": "EXECUTOR"}]
    loop = later("for-loop-3", "RUNNING", type="LOOP", type_attributes={"iteration_index": "1"})
    tasks = [
        later("teacher", "FAILED", type="DAG"),
        later("teacher.import-model", "CACHED"),
        later("teacher.evaluate", "FAILED", pods=pods, status_metadata={"message": "exit code 1"}),
        later("students.evaluate", "FAILED", pods=pods[:1], status_metadata={"message": "no such input"}),
        loop,
        later("for-loop-3.evaluate", "SUCCEEDED", pods=pods[:2], parent_task_id="for-loop-3"),
    ]
    lines, end = followed(kfp, api, demo, [{"state": "FAILED", "task_count": 6, "tasks": tasks}], loop=True)
    assert [line.partition("] ")[2] for line in lines] == [
        "import_model: unchanged, reused",
        "evaluate-teacher: FAILED after 2 min 00 s",
        "evaluate-before: NOT STARTED, Kubeflow's driver for it failed",
        "evaluate-trial (iteration 2): done in 2 min 00 s",
    ]
    assert ending(end, "")[1:] == [
        "evaluate-teacher failed in attempt 2 after 2 min 00 s: exit code 1; "
        "its log: `kubectl logs -n kubeflow e-2 -c main`",
        "evaluate-before was not started: Kubeflow's driver for it failed: no such input; "
        "its log: `kubectl logs -n kubeflow d -c main`",
    ]
