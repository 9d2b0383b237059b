"""Read the steps of a compiled pipeline, in the order in which they run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from graphlib import TopologicalSorter
from typing import Any

COMPONENT_PREFIX = "comp-"
STEPS = "skd_lib.steps."
"""Modules of the pipelines' steps."""


@dataclass(frozen=True)
class Step:
    """One container step.

    `name` is its module with its role, unique in the pipeline (`evaluate-teacher`); `component` is KFP's key without
    its prefix, which names the step's folder in a local run; a step with `is_exit` runs at the end, whether the others
    succeeded or failed; `loop` is the loop whose body it is in, `iteration` the round, see `unrolled`.
    """

    name: str
    component: str
    command: str
    cached: bool
    is_exit: bool
    waits_for: tuple[str, ...]
    loop: str = ""
    iteration: str = ""


def read_steps(spec: dict[str, Any]) -> list[Step]:
    """Return all container steps of a pipeline spec, nested DAGs included, each after the steps it waits for."""
    steps = _steps_of(spec["root"], spec)
    return [step for step in steps if not step.is_exit] + [step for step in steps if step.is_exit]


def unrolled(steps: list[Step], iterations: Sequence[str]) -> list[Step]:
    """Return the steps with those of a loop repeated for each of its rounds, round by round, named after it."""
    body = [step for step in steps if step.loop]
    first = steps.index(body[0]) if body else len(steps)
    rounds = [
        replace(
            step,
            name=f"{step.name}-{iteration}",
            component=round_key(step.component, number),
            waits_for=tuple(f"{name}-{iteration}" if name in inside else name for name in step.waits_for),
            iteration=iteration,
        )
        for inside in [{step.name for step in body}]
        for number, iteration in enumerate(iterations)
        for step in body
    ]
    return [*steps[:first], *rounds, *(step for step in steps[first:] if not step.loop)]


def round_key(component: str, number: int) -> str:
    """Return a key of its own for a component in each round of a loop."""
    return f"{component}#{number}"


def awaited(task: Mapping[str, Any]) -> list[str]:
    """Return the tasks that a task waits for: those it names, and those whose outputs it takes."""
    return sorted({*task.get("dependentTasks", []), *producers(task)})


def producers(task: Mapping[str, Any]) -> set[str]:
    """Return the tasks whose outputs a task takes. Kubeflow waits for them, whether it names them or not.

    (`addImplicitDependencies` of backend/src/v2/compiler/argocompiler/dag.go, kubeflow/pipelines 2.15 to 2.17.)
    """
    inputs = task.get("inputs", {})
    sources = [*inputs.get("parameters", {}).values(), *inputs.get("artifacts", {}).values()]
    kinds = ("taskOutputParameter", "taskOutputArtifact")
    return {source[kind]["producerTask"] for source in sources for kind in kinds if kind in source}


def _steps_of(
    component: dict[str, Any], spec: dict[str, Any], before: tuple[str, ...] = (), loop: str = ""
) -> list[Step]:
    """Return the steps of a DAG that starts after the steps `before`."""
    tasks: dict[str, Any] = component["dag"]["tasks"]
    order = TopologicalSorter({name: awaited(task) for name, task in tasks.items()}).static_order()
    steps: list[Step] = []
    ends: dict[str, tuple[str, ...]] = {}  # the steps with which a task ends
    for name in order:
        task = tasks[name]
        key = task["componentRef"]["name"]
        target = spec["components"][key]
        waits_for = (*before, *(step for other in awaited(task) for step in ends[other]))
        if "dag" in target:
            around = loop or (name if "parameterIterator" in task else "")
            inner = _steps_of(target, spec, waits_for, around)
            followed = {other for step in inner for other in step.waits_for}
            ends[name] = tuple(step.name for step in inner if step.name not in followed)
            steps += inner
            continue
        container = spec["deploymentSpec"]["executors"][target["executorLabel"]].get("container", {})
        command = container.get("command", [""])[-1]
        step = _step_name(task.get("taskInfo", {}).get("name", name), command)
        ends[name] = (step,)
        steps.append(
            Step(
                name=step,
                component=key.removeprefix(COMPONENT_PREFIX),
                command=command,
                cached=bool(task.get("cachingOptions", {}).get("enableCache")),
                is_exit=any(
                    "taskFinalStatus" in value for value in task.get("inputs", {}).get("parameters", {}).values()
                ),
                waits_for=waits_for,
                loop=loop,
            )
        )
    return steps


def _step_name(title: str, command: str) -> str:
    """Return a step's name: its title on Kubeflow's page, unless that is another word than its module's."""
    if not command.startswith(STEPS):
        return title
    module = command.removeprefix(STEPS)
    return title if title.partition("-")[0] == module else module
