"""Mistakes that KFP compiles without a word and that fail only in the cluster."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

_PART = r"[a-z0-9]+(?:[._-]+[a-z0-9]+)*"
_IMAGE = re.compile(
    rf"(?:[A-Za-z0-9.\[\]:-]+/)?{_PART}(?:/{_PART})*(?::\w[\w.-]{{0,127}})?(?:@sha256:[0-9a-f]{{64}})?", re.ASCII
)
"""An image's reference, as registries take it."""
PARAMETER = re.compile(r"inputs\.parameters\['([^']+)'\]")


def lint(spec: dict[str, Any]) -> list[str]:
    """What is wrong with a compiled pipeline spec, one sentence each; empty if nothing is.

    Every reference must resolve: components, executors, inputs of the enclosing DAG, outputs of producing tasks, and
    parameters named in a container's command or resources, which each task must pass even where they have a default.
    Every image must be versioned, and is named once whatever the number of its components. Every nested DAG must hold a
    step that is not cached.
    """
    components: dict[str, Any] = spec.get("components", {})
    executors: dict[str, Any] = spec.get("deploymentSpec", {}).get("executors", {})
    problems = []
    for name, component in {"root": spec.get("root", {}), **components}.items():
        if "dag" in component:
            problems += _dag(name, component, components, executors)
            if name != "root" and all(_cached_steps(component, components)):
                problems.append(f"{name}: all its steps are cached; KFP leaves such a DAG in state RUNNING")
        elif component.get("executorLabel") not in executors:
            problems.append(f"component {name}: executor {component.get('executorLabel')!r} does not exist")
        else:
            problems += _container(name, component, executors[component["executorLabel"]])
    return problems + _images(components, executors)


def _images(components: dict[str, Any], executors: dict[str, Any]) -> list[str]:
    users: dict[str, list[str]] = {}
    for name, component in components.items():
        container = executors.get(component.get("executorLabel"), {}).get("container")
        if container is not None:  # of an importer: no command, no image
            users.setdefault(container["image"], []).append(name)
    problems = []
    for image, names in users.items():
        version = image.rsplit("/", 1)[-1].partition(":")[2]
        if not _IMAGE.fullmatch(image):
            wrong = "is not the name of an image: REGISTRY/NAME:VERSION or REGISTRY/NAME@sha256:DIGEST"
        elif "@sha256:" not in image and version in ("", "latest"):
            wrong = "has neither version nor digest"
        else:
            continue
        others = f" (and {len(names) - 1} further components)" if len(names) > 1 else ""
        problems.append(f"component {names[0]}: image {image!r} {wrong}{others}")
    return problems


def _dag(name: str, component: dict[str, Any], components: dict[str, Any], executors: dict[str, Any]) -> list[str]:
    problems = []
    tasks: dict[str, Any] = component["dag"].get("tasks", {})
    given = component.get("inputDefinitions", {})
    for task_name, task in tasks.items():
        where = f"task {task_name} in {name}"
        target = components.get(task["componentRef"]["name"])
        if target is None:
            problems.append(f"{where}: component {task['componentRef']['name']!r} does not exist")
            continue
        problems += [
            f"{where}: waits for task {other!r}, which does not exist"
            for other in task.get("dependentTasks", [])
            if other not in tasks
        ]
        # KFP 2.17.0 fills in a container's arguments before it looks at the defaults of its parameters.
        used = _used(executors.get(target.get("executorLabel"), {}).get("container") or {})
        item = task.get("parameterIterator", {}).get("itemInput")
        for kind in ("parameters", "artifacts"):
            wanted = target.get("inputDefinitions", {}).get(kind, {})
            bound = task.get("inputs", {}).get(kind, {})
            problems += [
                f"{where}: input {missing!r} of {task['componentRef']['name']} has no value"
                for missing, definition in wanted.items()
                if missing not in bound and missing != item and (missing in used or not definition.get("isOptional"))
            ]
            for input_name, source in bound.items():
                fault = _source_fault(source, kind, given, tasks, components)
                if not fault and kind == "parameters":
                    fault = _type_fault(source, wanted.get(input_name, {}), given, tasks, components)
                if fault:
                    problems.append(f"{where}: input {input_name!r} {fault}")
        if "parameterIterator" in task and task.get("taskInfo", {}).get("name") != task_name:
            # KFP 2.15 keeps a loop's outputs under its title, and looks for them by its name.
            problems.append(f"{where}: a loop must have no name of its own")
    return problems


def _cached_steps(component: dict[str, Any], components: dict[str, Any]) -> Iterator[bool]:
    """Yield of each step of a DAG, in nested ones too, whether it is cached."""
    for task in component["dag"].get("tasks", {}).values():
        target = components.get(task["componentRef"]["name"], {})
        if "dag" in target:
            yield from _cached_steps(target, components)
        else:
            yield bool(task.get("cachingOptions", {}).get("enableCache"))


def _source_fault(
    source: dict[str, Any], kind: str, given: dict[str, Any], tasks: dict[str, Any], components: dict[str, Any]
) -> str:
    singular = kind.removesuffix("s").capitalize()
    inherited = source.get(f"componentInput{singular}")
    if inherited is not None and inherited not in given.get(kind, {}):
        return f"comes from {inherited!r}, which the enclosing DAG does not have"
    produced = source.get(f"taskOutput{singular}")
    if produced is None:
        return ""
    producer = tasks.get(produced["producerTask"])
    if producer is None:
        return f"comes from task {produced['producerTask']!r}, which is not in this DAG"
    outputs = components.get(producer["componentRef"]["name"], {}).get("outputDefinitions", {}).get(kind, {})
    key = produced[f"output{singular}Key"]
    return "" if key in outputs else f"comes from output {key!r} of {produced['producerTask']}, which does not exist"


def _type_fault(
    source: dict[str, Any],
    wanted: dict[str, Any],
    given: dict[str, Any],
    tasks: dict[str, Any],
    components: dict[str, Any],
) -> str:
    """A parameter that is no text needs a source of its type: KFP's driver refuses others, its compiler does not."""
    expected = _sort(wanted)
    if expected in ("", "STRING"):
        return ""
    if inherited := source.get("componentInputParameter"):
        if "parameterExpressionSelector" in source:
            return ""
        found = _sort(given.get("parameters", {}).get(inherited, {}))
    elif produced := source.get("taskOutputParameter"):
        component = components.get(tasks[produced["producerTask"]]["componentRef"]["name"], {})
        outputs = component.get("outputDefinitions", {}).get("parameters", {})
        found = _sort(outputs.get(produced["outputParameterKey"], {}))
    else:
        return ""
    return "" if found in ("", expected) else f"is {found}, and {expected} is expected"


def _sort(definition: dict[str, Any]) -> str:
    """A parameter's type; whole numbers and others are one."""
    return str(definition.get("parameterType", "")).replace("_INTEGER", "").replace("_DOUBLE", "")


def _container(name: str, component: dict[str, Any], executor: dict[str, Any]) -> list[str]:
    container = executor.get("container")
    if container is None:  # an importer: no command, no image
        return []
    known = component.get("inputDefinitions", {}).get("parameters", {})
    return [
        f"component {name}: uses parameter {parameter!r}, which it does not have"
        for parameter in sorted(_used(container) - known.keys())
    ]


def _used(container: dict[str, Any]) -> set[str]:
    """Parameters that a container's command or resources name."""
    texts = [*container.get("command", []), *container.get("args", []), str(container.get("resources", ""))]
    return {parameter for text in texts if isinstance(text, str) for parameter in PARAMETER.findall(text)}
