"""What Kubeflow's record of a run says of its steps.

Its words mean other things than they seem to (Kubeflow Pipelines 2.17.0, `RuntimeState.ToV2` and `NodeStatuses`): a
step that is reused is SUCCEEDED, and only the executor inside of it is SKIPPED; SKIPPED is a step whose condition does
not hold; a step whose driver failed has no state (Argo's Omitted), and FAILED is a task `<key>-driver`; a pod that was
deleted is FAILED as well (Argo's Error). A cancelled run ends as FAILED, with CANCELING in its history. A task that
has not ended ends in the year 1 or in 1970. No task has an error or the name of a pod.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from skd_kfp.pipelines.graph import COMPONENT_PREFIX, Step
from skd_kfp.pipelines.kubeflow.api import LIVE
from skd_kfp.pipelines.kubeflow.nodes import Node, nodes_of

SUCCEEDED, FAILED, SKIPPED, RUNNING, REUSED = "SUCCEEDED", "FAILED", "SKIPPED", "RUNNING", "REUSED"
CANCELING, CANCELED = "CANCELING", "CANCELED"
ENDED = frozenset({SUCCEEDED, REUSED, SKIPPED, FAILED})
POD_KINDS = ("EXECUTOR", "DRIVER")
POD_SECONDS = 2.0
"""No pod starts, runs and is seen to end within so little: a step that took less was reused."""


@dataclass(frozen=True)
class StepState:
    """A step of a run as it is now.

    Attributes:
        name: The step's, with the round of a loop: `distill (iteration 2)`. Of a DAG, the DAG's.
        state: RUNNING, SUCCEEDED, REUSED, SKIPPED (its condition does not hold) or FAILED.
        seconds: How long it took; 0 while it runs.
        attempts: How many are known to have been made.
        pod: The latest attempt's, or the driver's where that failed; empty where it is not known.
        driver: It did not start, since Kubeflow's driver failed.
        loop: The loop that it is in; empty outside of loops.
        message: What Kubeflow says of its failure; only the version without MLMD says something.
    """

    name: str
    state: str
    seconds: float = 0.0
    attempts: int = 0
    pod: str = ""
    driver: bool = False
    loop: str = ""
    message: str = ""


def read_states(run: Any, spec: dict[str, Any], steps: Sequence[Step]) -> list[StepState]:
    """Return the steps that a run's record tells of, in the order in which they began, each once.

    Args:
        run: As the API tells of it.
        spec: The pipeline spec.
        steps: Its steps.
    """
    if run.tasks:
        return read_tasks(run.tasks, spec, steps)
    tasks = (run.run_details and run.run_details.task_details) or []
    nodes = nodes_of(spec, frozenset(each for task in tasks for each in _children(task)))
    known = {step.component: step for step in steps}
    order = {step.component: number for number, step in enumerate(steps)}
    # A workflow that was started again leaves the tasks of its first course behind: the latest counts.
    latest: dict[tuple[str, int | None, str], tuple[Any, Node]] = {}
    for task in sorted(tasks, key=_start):
        node = _node_of(task, nodes)
        if node is not None and (node.driver or node.component in known):
            failed_driver = node.driver and task.state == FAILED
            key = (node.component, node.iteration, "" if node.component else node.title)
            if failed_driver or (not node.driver and task.state not in {None, "RUNTIME_STATE_UNSPECIFIED"}):
                latest[key] = (task, node)
    found = sorted(latest.values(), key=lambda each: (_start(each[0]), order.get(each[1].component, len(order))))
    return [_state(task, node, known.get(node.component)) for task, node in found]


def read_tasks(tasks: Sequence[Mapping[str, Any]], spec: dict[str, Any], steps: Sequence[Step]) -> list[StepState]:
    """Return the same from the record of the version without MLMD.

    There a task says which it is (`scope_path`: `root.teacher.evaluate`), in which round of a loop its parent is, and
    the names of its pods; a step that is reused is CACHED (backend/api/v2beta1/run.proto, branch mlmd-removal).
    """
    known = {step.component: step for step in steps}
    by_id = {task.get("task_id"): task for task in tasks}
    states = []
    for task in sorted(tasks, key=lambda task: str(task.get("create_time"))):
        step = known.get(_component_at(str(task.get("scope_path", "")), spec))
        state = {"CACHED": REUSED}.get(str(task.get("state")), str(task.get("state")))
        if step is None or state not in {*ENDED, RUNNING}:
            continue
        pods = {kind: [pod["name"] for pod in task.get("pods") or [] if pod.get("type") == kind] for kind in POD_KINDS}
        begun, ended = _time(task.get("create_time")), _time(task.get("end_time"))
        driver = state == FAILED and not pods["EXECUTOR"]
        states.append(
            StepState(
                f"{step.name}{_round(_iteration(task, by_id))}",
                state,
                max(ended - begun, 0.0) if state in ENDED else 0.0,
                len(pods["EXECUTOR"]),
                next(iter((pods["EXECUTOR"] or pods["DRIVER"])[-1:]), ""),
                driver=driver,
                loop=step.loop,
                message=str((task.get("status_metadata") or {}).get("message") or ""),
            )
        )
    return states


def _component_at(scope: str, spec: dict[str, Any]) -> str:
    """The component of the task at a path; empty where there is none."""
    component, name = spec["root"], ""
    for key in scope.split(".")[1:]:
        task = component.get("dag", {}).get("tasks", {}).get(key)
        if task is None:
            return ""
        name = task["componentRef"]["name"]
        component = spec["components"][name]
    return name.removeprefix(COMPONENT_PREFIX)


def _iteration(task: Mapping[str, Any], by_id: Mapping[Any, Mapping[str, Any]]) -> int | None:
    """In which round of a loop a task is; None outside of loops."""
    above: Mapping[str, Any] | None = task
    for _ in by_id:
        if above is None:
            return None
        index = (above.get("type_attributes") or {}).get("iteration_index")
        if index is not None:
            return int(index)
        above = by_id.get(above.get("parent_task_id"))
    return None


def _time(text: Any) -> float:
    return datetime.fromisoformat(str(text)).timestamp() if text else 0.0


def _round(iteration: int | None) -> str:
    return f" (iteration {iteration + 1})" if iteration is not None else ""


def was_cancelled(run: Any) -> bool:
    """Whether a person has cancelled a run; it may still be ending."""
    history = {status.state for status in run.state_history or []}
    return run.state != SUCCEEDED and bool({CANCELING, CANCELED} & ({run.state} | history))


def iterations_of(states: Iterable[StepState]) -> dict[str, int]:
    """Return how many rounds each loop is known to have, by what has begun."""
    rounds: dict[str, set[str]] = {}
    for state in states:
        if state.loop:
            rounds.setdefault(state.loop, set()).add(state.name.rpartition(" (")[2])
    return {loop: len(names) for loop, names in rounds.items()}


def _node_of(task: Any, nodes: Sequence[Node]) -> Node | None:
    """The node that a task is: of that display name and with these children, or the only one of that name."""
    named = [node for node in nodes if node.display == task.display_name]
    children = _children(task)
    found = next((node for node in named if node.children & children), None)
    alike = {(node.component, node.title, node.driver, node.iteration) for node in named}
    return found or (named[0] if len(alike) == 1 else None)


def _state(task: Any, node: Node, step: Step | None) -> StepState:
    name = f"{step.name if step else node.title}{_round(node.iteration)}"
    pod = node.pods[-1] if node.pods else ""
    loop = step.loop if step else ""
    if node.driver:
        return StepState(name, FAILED, _seconds(task), 0, pod, driver=True, loop=loop)
    state, seconds = task.state, _seconds(task)
    if state == SUCCEEDED and step and step.cached and not node.tried and seconds < POD_SECONDS:
        state = REUSED
    if state not in ENDED:
        state, seconds = RUNNING, 0.0
    return StepState(name, state, seconds, node.tried, pod, loop=loop)


def is_live(run: Any) -> bool:
    """Whether a run has not ended."""
    return run.state in LIVE


def _children(task: Any) -> frozenset[str]:
    return frozenset(child.pod_name for child in task.child_tasks or [] if child.pod_name)


def _start(task: Any) -> float:
    start = task.start_time or task.create_time
    return float(start.timestamp()) if start and start.year > 1 else 0.0


def _seconds(task: Any) -> float:
    start = task.start_time or task.create_time
    return max(float((task.end_time - start).total_seconds()), 0.0) if start and task.end_time else 0.0
