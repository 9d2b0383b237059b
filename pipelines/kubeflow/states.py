"""Read the states of a run's steps from Kubeflow's record of the run.

Its words mean other things than they seem to (Kubeflow Pipelines 2.17.0, `RuntimeState.ToV2` and `NodeStatuses`): a
step that is reused is SUCCEEDED, and only the executor inside of it is SKIPPED; SKIPPED is a step whose condition does
not hold; a step whose driver failed has no state (Argo's Omitted), and FAILED is a task `<key>-driver`; a pod that was
deleted is FAILED as well (Argo's Error). A cancelled run ends as FAILED, with CANCELING in its history. A task that
has not ended ends in the year 1 or in 1970. No task has an error or the name of a pod.

The record names every node of Argo by its display name, which is the task's key in its DAG (so that four may be called
`evaluate`, and every step has an `executor`), and by the ids of its children, not by its own id or parent. But the id
of a node is the workflow's name and a hash of the node's path, and the paths follow from the pipeline: this module
walks the paths that the pipeline allows, as far as nodes with these ids exist.

Sources: backend/src/v2/compiler/argocompiler/{dag,container}.go and backend/src/common/util/workflow.go (NodeStatuses)
of Kubeflow Pipelines 2.17.0; workflow/util/pod_name.go and workflow/controller/{dag,operator}.go of Argo 4.0.8.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from skd_kfp.pipelines.graph import COMPONENT_PREFIX, Step

SUCCEEDED, FAILED, SKIPPED, RUNNING, REUSED = "SUCCEEDED", "FAILED", "SKIPPED", "RUNNING", "REUSED"
CANCELING, CANCELED = "CANCELING", "CANCELED"
ENDED = frozenset({SUCCEEDED, REUSED, SKIPPED, FAILED})
POD_KINDS = ("EXECUTOR", "DRIVER")
POD_SECONDS = 2.0
"""No pod starts, runs and ends within this time: a step that took less was reused."""
FNV_OFFSET, FNV_PRIME, WORD = 0x811C9DC5, 0x01000193, 0xFFFFFFFF
MAX_ATTEMPTS = 100
MAX_ITERATIONS = 10_000
DRIVER = "-driver"


@dataclass(frozen=True)
class StepState:
    """A step of a run as it is now.

    `name` has the round of a loop: `distill (iteration 2)`. `state` is RUNNING, SUCCEEDED, REUSED, SKIPPED (its
    condition does not hold) or FAILED, with `driver` where Kubeflow's driver for it failed. `pod` is the latest
    attempt's, or the driver's; empty where it is not known. Only the version without MLMD has a `message`.
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
    """Return the steps in a run's record, in the order in which they began, each once."""
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
    """Return the steps in the record of the version without MLMD.

    There a task names itself (`scope_path`: `root.teacher.evaluate`), the round of its parent's loop, and the
    names of its pods; a step that is reused is CACHED (backend/api/v2beta1/run.proto, branch mlmd-removal).
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
    """Return the component of the task at a path; empty where there is none."""
    component, name = spec["root"], ""
    for key in scope.split(".")[1:]:
        task = component.get("dag", {}).get("tasks", {}).get(key)
        if task is None:
            return ""
        name = task["componentRef"]["name"]
        component = spec["components"][name]
    return name.removeprefix(COMPONENT_PREFIX)


def _iteration(task: Mapping[str, Any], by_id: Mapping[Any, Mapping[str, Any]]) -> int | None:
    """Return the round of a loop in which a task is; None outside of loops."""
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
    """Return whether a person has cancelled a run; it may still be ending."""
    history = {status.state for status in run.state_history or []}
    return run.state != SUCCEEDED and bool({CANCELING, CANCELED} & ({run.state} | history))


def iterations_of(states: Iterable[StepState]) -> dict[str, int]:
    """Return the number of rounds of each loop that have begun."""
    rounds: dict[str, set[str]] = {}
    for state in states:
        if state.loop:
            rounds.setdefault(state.loop, set()).add(state.name.rpartition(" (")[2])
    return {loop: len(names) for loop, names in rounds.items()}


def _node_of(task: Any, nodes: Sequence[Node]) -> Node | None:
    """Return the node of a task: it has its display name and children, or is the only one of that name."""
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
    """Return whether a run has not ended."""
    return run.state in {None, "RUNTIME_STATE_UNSPECIFIED", "PENDING", RUNNING, CANCELING, "PAUSED"}


def _children(task: Any) -> frozenset[str]:
    return frozenset(child.pod_name for child in task.child_tasks or [] if child.pod_name)


def _start(task: Any) -> float:
    start = task.start_time or task.create_time
    return float(start.timestamp()) if start and start.year > 1 else 0.0


def _seconds(task: Any) -> float:
    start = task.start_time or task.create_time
    return max(float((task.end_time - start).total_seconds()), 0.0) if start and task.end_time else 0.0


@dataclass(frozen=True)
class Node:
    """A node of a step, or of a DAG.

    `component` is empty for a DAG; `title` is the task's key; `children` are ids of existing nodes that can only be
    children of this one; `tried` counts the attempts that are known to have had a pod; `pods` may have existed, the
    latest last.
    """

    component: str
    title: str
    iteration: int | None
    driver: bool
    display: str
    children: frozenset[str]
    tried: int
    pods: tuple[str, ...]


def node_id(workflow: str, path: str) -> str:
    """Return the id that Argo gives a node: the workflow's name and the 32-bit FNV-1a hash of the node's path."""
    return f"{workflow}-{_hash(path)}"


def nodes_of(spec: dict[str, Any], ids: frozenset[str]) -> list[Node]:
    """Return the nodes of a run's steps and DAGs that exist, or may exist as leaves.

    `ids` are those of all nodes that are children of another.
    """
    workflow = next((each.rpartition("-")[0] for each in ids), "")
    return list(_Walk(spec, workflow, ids).run()) if workflow else []


class _Walk:
    def __init__(self, spec: dict[str, Any], workflow: str, ids: frozenset[str]) -> None:
        self._spec, self._workflow, self._ids = spec, workflow, ids

    def run(self) -> Iterator[Node]:
        for entry in self._attempts(self._workflow):
            yield self._driver(f"{entry}.root", "", "root", None)
            yield from self._dag(f"{entry}.root", self._spec["root"], None)

    def _dag(self, path: str, component: dict[str, Any], iteration: int | None) -> Iterator[Node]:
        """Yield the nodes below the DAG at `path`."""
        for place in self._attempts(path):
            for key, task in component["dag"]["tasks"].items():
                before = task.get("dependentTasks", [])
                hook = task.get("triggerPolicy", {}).get("strategy") == "ALL_UPSTREAM_TASKS_COMPLETED"
                holders = [f"{place}.{each}.onExit" for each in before] if hook else [place]
                for holder in (attempt for each in holders for attempt in self._attempts(each)):
                    yield from self._task(f"{holder}.{key}", key, task, iteration)

    def _task(self, path: str, key: str, task: dict[str, Any], iteration: int | None) -> Iterator[Node]:
        name = task["componentRef"]["name"]
        component = self._spec["components"][name]
        if "dag" not in component:
            yield self._driver(path, name.removeprefix(COMPONENT_PREFIX), key, iteration)
            yield self._step(path, name.removeprefix(COMPONENT_PREFIX), key, task, iteration)
        elif "parameterIterator" in task:
            for place in self._attempts(path):
                yield self._driver(f"{place}.iteration", "", key, None)
                for number in range(MAX_ITERATIONS):
                    holder = f"{place}.iteration-iterations({number}:{number})"
                    if not self._exists(holder):
                        break
                    for each in self._attempts(holder):
                        yield self._driver(f"{each}.iteration-item", "", key, number)
                        yield from self._dag(f"{each}.iteration-item", component, number)
        else:
            yield self._driver(path, "", key, iteration)
            yield from self._dag(path, component, iteration)

    def _step(self, path: str, component: str, key: str, task: dict[str, Any], iteration: int | None) -> Node:
        template = f"{'retry-' if 'retryPolicy' in task else ''}system-container-impl"
        executors = [f"{place}.executor" for place in self._attempts(path)]
        tried = [attempt for executor in executors for attempt in self._attempts(executor)[1:]]
        pods = [self._pod(template, attempt) for attempt in tried or executors if self._exists(attempt)]
        children = self._known([*executors, *self._attempts(path)[1:]])
        return Node(component, key, iteration, False, path.rpartition(".")[2], children, len(tried), tuple(pods))

    def _driver(self, path: str, component: str, key: str, iteration: int | None) -> Node:
        """Return the driver of the step or DAG at `path`, which runs before it."""
        driver = path + DRIVER
        template = f"system-{'container' if component else 'dag'}-driver"
        pods = [self._pod(template, attempt) for attempt in self._attempts(driver)[1:] or [driver]]
        children = self._known([*self._attempts(driver)[1:], path])
        return Node(component, key, iteration, True, driver.rpartition(".")[2], children, 0, tuple(pods))

    def _attempts(self, path: str) -> list[str]:
        """Return the node, and its attempts where it is a Retry node: `distill`, `distill(0)`, `distill(1)`."""
        found = [path]
        for number in range(MAX_ATTEMPTS):
            attempt = f"{path}({number})"
            if not self._exists(attempt):
                break
            found.append(attempt)
        return found

    def _exists(self, path: str) -> bool:
        return node_id(self._workflow, path) in self._ids

    def _known(self, paths: Iterable[str]) -> frozenset[str]:
        return frozenset(node_id(self._workflow, path) for path in paths) & self._ids

    def _pod(self, template: str, path: str) -> str:
        return f"{self._workflow}-{template}-{_hash(path)}"


def _hash(path: str) -> int:
    value = FNV_OFFSET
    for byte in path.encode():
        value = (value ^ byte) * FNV_PRIME & WORD
    return value
