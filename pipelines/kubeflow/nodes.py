"""Argo's nodes of a run: which step a task that Kubeflow's API tells of belongs to, and what its pods are called.

The API tells of every node by its display name, which is the task's key in its DAG (so that `evaluate` may be four of
them, and every step has an `executor`), and by the ids of its children; not by its own id or parent. But the id of a
node is the workflow's name and a hash of the node's path, and the paths follow from the pipeline. So we walk the paths
that the pipeline allows, as far as nodes with these ids exist.

Sources: backend/src/v2/compiler/argocompiler/{dag,container}.go and backend/src/common/util/workflow.go (NodeStatuses)
of Kubeflow Pipelines 2.17.0; workflow/util/pod_name.go and workflow/controller/{dag,operator}.go of Argo 4.0.8.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from skd_kfp.pipelines.graph import COMPONENT_PREFIX

FNV_OFFSET, FNV_PRIME, WORD = 0x811C9DC5, 0x01000193, 0xFFFFFFFF
MAX_ATTEMPTS = 100
MAX_ITERATIONS = 10_000
DRIVER = "-driver"


@dataclass(frozen=True)
class Node:
    """A node of a step, or of a DAG.

    Attributes:
        component: The step's component, as `skd_kfp.pipelines.graph.Step` has it; of a DAG empty.
        title: The task's key, or the DAG's.
        iteration: Of which round of a loop; None outside of loops.
        driver: It is Kubeflow's driver for the step or DAG, which prepares its start.
        display: Its display name.
        children: Ids of nodes that can only be children of this one.
        tried: How many attempts at the step are known to have had a pod; 0 also where there is no telling.
        pods: Names of the pods that there may have been, the latest last.
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


def workflow_name(ids: Iterable[str]) -> str:
    """Return the name of the workflow whose nodes have these ids; empty where there are none."""
    return next((each.rpartition("-")[0] for each in ids), "")


def nodes_of(spec: dict[str, Any], ids: frozenset[str]) -> list[Node]:
    """Return the nodes of a run's steps and DAGs that exist, or may exist as leaves.

    Args:
        spec: The pipeline spec.
        ids: Ids of all nodes that are children of another.
    """
    workflow = workflow_name(ids)
    return list(_Walk(spec, workflow, ids).run()) if workflow else []


class _Walk:
    def __init__(self, spec: dict[str, Any], workflow: str, ids: frozenset[str]) -> None:
        self._spec, self._workflow, self._ids = spec, workflow, ids

    def run(self) -> Iterator[Node]:
        for entry in self._attempts(self._workflow):
            yield self._driver(f"{entry}.root", "", "root", None)
            yield from self._dag(f"{entry}.root", self._spec["root"], None)

    def _dag(self, path: str, component: dict[str, Any], iteration: int | None) -> Iterator[Node]:
        """The nodes below the DAG at `path`."""
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
        return Node(component, key, iteration, False, _display(path), children, len(tried), tuple(pods))

    def _driver(self, path: str, component: str, key: str, iteration: int | None) -> Node:
        """The driver of the step or DAG at `path`, which comes before it."""
        driver = path + DRIVER
        template = f"system-{'container' if component else 'dag'}-driver"
        pods = [self._pod(template, attempt) for attempt in self._attempts(driver)[1:] or [driver]]
        children = self._known([*self._attempts(driver)[1:], path])
        return Node(component, key, iteration, True, _display(driver), children, 0, tuple(pods))

    def _attempts(self, path: str) -> list[str]:
        """The node itself, and its attempts where it is a Retry node: `distill`, `distill(0)`, `distill(1)`."""
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


def _display(path: str) -> str:
    return path.rpartition(".")[2]


def _hash(path: str) -> int:
    value = FNV_OFFSET
    for byte in path.encode():
        value = (value ^ byte) * FNV_PRIME & WORD
    return value
