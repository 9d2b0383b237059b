"""The steps of a compiled pipeline, in the order in which they run."""

from __future__ import annotations

from dataclasses import dataclass
from graphlib import TopologicalSorter
from typing import Any

COMPONENT_PREFIX = "comp-"


@dataclass(frozen=True)
class Step:
    """One container step.

    Attributes:
        name: Display name, unique in the pipeline: `evaluate_teacher`.
        component: KFP's component key without its prefix, which names the step's folder in a local run: `evaluate-2`.
        command: The module it runs: `skd_lib.steps.evaluate`.
        cached: Whether its outputs are reused when nothing it depends on has changed.
        is_exit: It runs at the end, whether the others succeeded or failed.
        waits_for: Names of the steps it waits for directly.
        choice: Names the choice (If, Else) that it is an outcome of; empty if it always runs.
    """

    name: str
    component: str
    command: str
    cached: bool
    is_exit: bool
    waits_for: tuple[str, ...]
    choice: str = ""


def read_steps(spec: dict[str, Any]) -> list[Step]:
    """All container steps of a pipeline spec, nested DAGs included, each after the steps it waits for."""
    steps = _steps_of("root", spec["root"], spec)
    return [step for step in steps if not step.is_exit] + [step for step in steps if step.is_exit]


def count_steps(steps: list[Step]) -> int:
    """How many steps a run has: of each choice one."""
    return sum(not step.choice for step in steps) + len({step.choice for step in steps if step.choice})


def _steps_of(
    dag: str, component: dict[str, Any], spec: dict[str, Any], before: tuple[str, ...] = (), choice: str = ""
) -> list[Step]:
    """The steps of the DAG named `dag`, which starts after the steps `before`."""
    tasks: dict[str, Any] = component["dag"]["tasks"]
    order = TopologicalSorter({name: task.get("dependentTasks", []) for name, task in tasks.items()}).static_order()
    steps: list[Step] = []
    ends: dict[str, tuple[str, ...]] = {}  # the steps with which a task ends
    for name in order:
        task = tasks[name]
        key = task["componentRef"]["name"]
        target = spec["components"][key]
        waits_for = (*before, *(step for other in task.get("dependentTasks", []) for step in ends[other]))
        if "dag" in target:
            # The outcomes of one choice are conditional tasks of one DAG.
            outcome = choice or (dag if "condition" in task.get("triggerPolicy", {}) else "")
            inner = _steps_of(name, target, spec, waits_for, outcome)
            awaited = {other for step in inner for other in step.waits_for}
            ends[name] = tuple(step.name for step in inner if step.name not in awaited)
            steps += inner
            continue
        container = spec["deploymentSpec"]["executors"][target["executorLabel"]].get("container", {})
        ends[name] = (_display_name(task, name),)
        steps.append(
            Step(
                name=_display_name(task, name),
                component=key.removeprefix(COMPONENT_PREFIX),
                command=" ".join(container.get("command", [])).removeprefix("python3 -m "),
                cached=bool(task.get("cachingOptions", {}).get("enableCache")),
                is_exit=any(
                    "taskFinalStatus" in value for value in task.get("inputs", {}).get("parameters", {}).values()
                ),
                waits_for=waits_for,
                choice=choice,
            )
        )
    return steps


def _display_name(task: dict[str, Any], key: str) -> str:
    return str(task.get("taskInfo", {}).get("name", key))
