"""Argo's nodes of a run, and the tasks that Kubeflow's API makes of them.

Rules and their sources (Kubeflow Pipelines 2.17.0, Argo 4.0.8), each of which was also seen in a real backend:

- `<key>-driver`, then `<key>` with an `executor` inside (argocompiler/container.go); with `retryPolicy` the executor is
  a Retry node with a child for each attempt; with `templateDefaults.retryStrategy` every node is one;
- a reused step has Succeeded, its executor is Skipped; a step whose driver failed is Omitted, and so is what follows;
- loops: `<key>` > `iteration-driver`, `iteration-iterations(0:0)` > `iteration-item-driver`, `iteration-item`
  (argocompiler/dag.go); the exit task is below `<key>.onExit`;
- a task's display name is the node's, it has no error and no pod name, its children are node ids: the workflow's name
  and FNV-1a of the node's path; what has not ended ends in the year 1 (common/util/workflow.go, NodeStatuses);
- Omitted has no state (model/run.go, ToV2), Error is FAILED.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from graphlib import TopologicalSorter
from typing import Any

EPOCH = datetime(2026, 1, 1, tzinfo=UTC)
NEVER = "0001-01-01T00:00:00+00:00"
STATES = {"Omitted": "RUNTIME_STATE_UNSPECIFIED", "Error": "FAILED"}
GOOD = {"Succeeded", "Skipped"}


def node_id(workflow: str, path: str) -> str:
    if path == workflow:
        return workflow
    value = 2166136261
    for byte in path.encode():
        value = ((value ^ byte) * 16777619) % 2**32
    return f"{workflow}-{value}"


@dataclass
class Node:
    path: str
    display: str
    phase: str
    start: float
    end: float | None
    children: list[str] = field(default_factory=list)


@dataclass
class FakeWorkflow:
    """A workflow's course.

    Attributes:
        spec: The pipeline spec.
        outcomes: How tasks end, by their keys from the root on (`exit-handler-1.teacher.evaluate`): `ok` (the
            default), `cached`, `failed`, `driver` (its driver failed), `running`, `condition` (it does not hold), or
            `retried` (failed once, then succeeded). A round of a loop is `#0`, `#1`.
        wrapped: Every template has a retry strategy.
        rounds: How many rounds a loop has.
        began: When it began, in seconds.
    """

    spec: dict[str, Any]
    outcomes: dict[str, str] = field(default_factory=dict)
    wrapped: bool = False
    rounds: int = 2
    name: str = "skd-distillation-x7abc"
    began: float = 0.0
    nodes: dict[str, Node] = field(default_factory=dict)
    clock: float = 0.0

    def __post_init__(self) -> None:
        self.clock = self.began
        self._wrap(self.name, self.name, lambda entry: self._entry(entry))

    def tasks(self) -> list[dict[str, Any]]:
        """As the API tells of them, in no order."""
        told = [self._task(node) for node in self.nodes.values()]
        random.Random(0).shuffle(told)
        return told

    def pod(self, template: str, path: str) -> str:
        return f"{self.name}-{template}-{node_id(self.name, path).rpartition('-')[2]}"

    def _task(self, node: Node) -> dict[str, Any]:
        children = [{"pod_name": node_id(self.name, child)} for child in node.children]
        return {
            "display_name": node.display,
            "state": STATES.get(node.phase, node.phase.upper()),
            "start_time": (EPOCH + timedelta(seconds=node.start)).isoformat(),
            "end_time": NEVER if node.end is None else (EPOCH + timedelta(seconds=node.end)).isoformat(),
            **({"child_tasks": children} if children else {}),
        }

    def _add(self, path: str, phase: str, seconds: float = 0.0, display: str = "") -> Node:
        node = Node(path, display or path.rpartition(".")[2], phase, self.clock, None)
        self.clock += seconds
        node.end = None if phase == "Running" else self.clock
        self.nodes[path] = node
        return node

    def _wrap(self, path: str, display: str, inside: Any) -> str:
        """A node, or a Retry node with one attempt; its phase."""
        if not self.wrapped:
            return self._dag_node(path, display, inside)
        retry = self._add(path, "Running", display=display)
        attempt = f"{path}(0)"
        retry.children.append(attempt)
        retry.phase = self._dag_node(attempt, f"{display}(0)", inside)
        retry.end = None if retry.phase == "Running" else self.clock
        return retry.phase

    def _dag_node(self, path: str, display: str, inside: Any) -> str:
        node = self._add(path, "Running", display=display)
        node.phase = inside(path)
        node.end = None if node.phase == "Running" else self.clock
        return node.phase

    def _pod_node(self, path: str, phase: str, seconds: float) -> None:
        if not self.wrapped:
            self._add(path, phase, seconds)
            return
        retry = self._add(path, phase)
        retry.children.append(f"{path}(0)")
        self._add(f"{path}(0)", phase, seconds)
        retry.end = self.nodes[f"{path}(0)"].end

    def _entry(self, path: str) -> str:
        self._pod_node(f"{path}.root-driver", "Succeeded", 3)
        self.nodes[path].children.append(f"{path}.root-driver")
        self._leaf(f"{path}.root-driver").children.append(f"{path}.root")
        return self._wrap(f"{path}.root", "root", lambda each: self._dag(each, self.spec["root"], ""))

    def _leaf(self, path: str) -> Node:
        """The node after which dependents hang."""
        node = self.nodes[path]
        own = [child for child in node.children if child.startswith(path)]
        return self._leaf(own[-1]) if own else node

    def _dag(self, place: str, component: dict[str, Any], key: str) -> str:
        tasks = component["dag"]["tasks"]
        hooks = {n for n, t in tasks.items() if t.get("triggerPolicy", {}).get("strategy")}
        order = TopologicalSorter({n: t.get("dependentTasks", []) for n, t in tasks.items() if n not in hooks})
        phases: dict[str, str] = {}
        for name in order.static_order():
            before = tasks[name].get("dependentTasks", [])
            ends = [phases[other] for other in before]
            if {"Running", "absent"} & set(ends):
                phases[name] = "absent"
                continue
            parents = [self._leaf(f"{place}.{other}") for other in before] or [self.nodes[place]]
            phases[name] = self._start(place, name, tasks[name], f"{key}.{name}".strip("."), parents, ends)
        for hook in hooks:
            (after,) = tasks[hook]["dependentTasks"]
            if phases[after] != "Running":
                exit_ = f"{place}.{after}.onExit"
                self.nodes[f"{place}.{after}"].children.append(exit_)
                self._wrap(
                    exit_,
                    f"{after}.onExit",
                    lambda each, hook=hook: self._start(
                        each, hook, tasks[hook], f"{key}.{hook}".strip("."), [self.nodes[each]], []
                    ),
                )
        found = set(phases.values())
        return next((p for p in ("Running", "Failed") if p in found), "Failed" if "Omitted" in found else "Succeeded")

    def _start(
        self, place: str, name: str, task: dict[str, Any], key: str, parents: list[Node], before: list[str]
    ) -> str:
        outcome = self.outcomes.get(key, "ok")
        component = self.spec["components"][task["componentRef"]["name"]]
        path, driver = f"{place}.{name}", f"{place}.{name}-driver"
        if set(before) - GOOD:
            for parent in parents:
                parent.children.append(driver)
            self._add(driver, "Omitted")
            self.nodes[driver].children.append(path)
            self._add(path, "Omitted")
            return "Omitted"
        if "parameterIterator" in task:
            for parent in parents:
                parent.children.append(path)
            return self._wrap(path, name, lambda each: self._loop(each, component, key))
        for parent in parents:
            parent.children.append(driver)
        self._pod_node(driver, "Failed" if outcome == "driver" else "Succeeded", 3)
        self._leaf(driver).children.append(path)
        if outcome == "driver":
            self._add(path, "Omitted")
            return "Failed"
        if outcome == "condition":
            self._add(path, "Skipped")
            return "Skipped"
        if "dag" in component:
            return self._wrap(path, name, lambda each: self._dag(each, component, key))
        return self._wrap(path, name, lambda each: self._executor(each, task, outcome))

    def _executor(self, place: str, task: dict[str, Any], outcome: str) -> str:
        path = f"{place}.executor"
        self.nodes[place].children.append(path)
        if outcome == "cached":
            self._add(path, "Skipped")
            return "Succeeded"
        phase = {"failed": "Failed", "running": "Running"}.get(outcome, "Succeeded")
        if "retryPolicy" not in task and not self.wrapped:
            self._add(path, phase, 60)
            return phase
        retry = self._add(path, phase)
        tries = {"failed": ["Failed"] * 3, "retried": ["Failed", "Succeeded"]}.get(outcome, [phase])
        for number, each in enumerate(tries):
            retry.children.append(f"{path}({number})")
            self._add(f"{path}({number})", each, 60)
        retry.end = None if phase == "Running" else self.clock
        return phase

    def _loop(self, place: str, component: dict[str, Any], key: str) -> str:
        driver = f"{place}.iteration-driver"
        self.nodes[place].children.append(driver)
        self._pod_node(driver, "Succeeded", 3)
        group = f"{place}.iteration-iterations"
        self._leaf(driver).children.append(group)
        self._add(group, "Succeeded")
        phases = []
        for number in range(self.rounds):
            item = f"{group}({number}:{number})"
            self.nodes[group].children.append(item)
            display = f"iteration-iterations({number}:{number})"
            phases.append(self._wrap(item, display, lambda each, n=number: self._item(each, component, f"{key}#{n}")))
        return next((p for p in ("Running", "Failed") if p in phases), "Succeeded")

    def _item(self, place: str, component: dict[str, Any], key: str) -> str:
        driver = f"{place}.iteration-item-driver"
        self.nodes[place].children.append(driver)
        self._pod_node(driver, "Succeeded", 3)
        path = f"{place}.iteration-item"
        self._leaf(driver).children.append(path)
        return self._wrap(path, "iteration-item", lambda each: self._dag(each, component, key))
