"""Find mistakes in a compiled pipeline that KFP compiles without an error and that fail only in the cluster."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from google.protobuf import json_format
from google.protobuf.message import Message
from kfp.kubernetes.kubernetes_executor_config_pb2 import KubernetesExecutorConfig
from kfp.pipeline_spec.pipeline_spec_pb2 import PipelineDeploymentConfig, PipelineSpec, PlatformSpec

from skd_lib._core.machine import ENGINE_IMAGE_VARIABLE

Values = dict[str, Any]
SHARED_MEMORY = "/dev/shm"  # noqa: S108 - a mount point in the container
_PART = r"[a-z0-9]+(?:[._-]+[a-z0-9]+)*"
_IMAGE = re.compile(
    rf"(?:[A-Za-z0-9.\[\]:-]+/)?{_PART}(?:/{_PART})*(?::\w[\w.-]{{0,127}})?(?:@sha256:[0-9a-f]{{64}})?", re.ASCII
)
_PARAMETER = re.compile(r"inputs\.parameters\['([^']+)'\]")
_DIGEST = re.compile(r"@sha256:[0-9a-f]{64}$")
_SECRET_NAME = re.compile(r"token|passw|secret|api_?key|access_?key|credential|webhook", re.IGNORECASE)
# How tokens of services begin that are used here, private keys, and URLs that contain a password or are one.
_SECRET_VALUE = re.compile(
    r"\bhf_[A-Za-z0-9]{20,}|\bsk-[A-Za-z0-9_-]{20,}|gh[pousr]_[A-Za-z0-9]{20,}|AKIA[0-9A-Z]{16}|AIza[0-9A-Za-z_-]{35}"
    r"|ya29\.[\w-]{20,}|xox[abprs]-[\w-]{10,}|-----BEGIN [A-Z ]*PRIVATE KEY|https://hooks\.slack\.com/services/\w+"
    r"|\b[a-z][a-z0-9+.-]*://[^/\s:@]+:[^/\s@]+@"
)


def find_problems(documents: list[Values], *, release: bool = False) -> list[str]:
    """Return the problems of a compiled pipeline, a sentence each; a `release` needs all images named by digest."""
    problems = _unknown_fields(documents)
    if problems:  # the other rules read what these find malformed
        return problems
    spec, pods = documents[0], _pods(documents)
    problems = [
        *(problem for dag in _dags(spec) for problem in _dag_problems(dag, spec)),
        *_container_problems(spec),
        *_image_problems(spec),
        *_platform_problems(spec, pods),
        *_gpu_problems(spec, pods),
        *_secret_problems(documents),
    ]
    if release:
        containers = _containers(spec).values()
        images = {container["image"] for container in containers}
        images |= {
            variable["value"]
            for container in containers
            for variable in container.get("env", [])
            if variable["name"] == ENGINE_IMAGE_VARIABLE
        }
        problems += [
            f"image {each!r} is not named by its digest" for each in sorted(images) if not _DIGEST.search(each)
        ]
    return problems


def _unknown_fields(documents: list[Values]) -> list[str]:
    """Find fields that KFP does not know, or of another type."""
    if len(documents) != 2:
        return [f"there are {len(documents)} documents, not a pipeline spec and a platform spec"]
    spec, platform = documents
    parts: list[tuple[str, Values, Message]] = [
        ("pipeline spec", spec, PipelineSpec()),
        ("pipeline spec, deploymentSpec", spec.get("deploymentSpec", {}), PipelineDeploymentConfig()),
        ("platform spec", platform, PlatformSpec()),
        *((f"platform spec, executor {key}", pod, KubernetesExecutorConfig()) for key, pod in _pods(documents).items()),
    ]
    problems = []
    for where, values, message in parts:
        try:
            json_format.ParseDict(values, message)
        except json_format.ParseError as error:
            problems.append(f"{where}: {' '.join(str(error).split())}")
    return problems


# --- the parts of a pipeline --------------------------------------------------------------------------------------


class _Dag(NamedTuple):
    """One DAG of a pipeline; `given` are its inputs, by kind: `parameters` or `artifacts`."""

    name: str
    tasks: dict[str, Values]
    given: dict[str, Values]
    components: dict[str, Values]

    def target(self, task: str) -> Values:
        """Return the component that a task runs; empty where there is none."""
        return self.components.get(self.tasks[task]["componentRef"]["name"], {})

    def cached_steps(self) -> Iterator[bool]:
        """Tell of each step, in nested DAGs too, whether it is cached."""
        for name, task in self.tasks.items():
            if "dag" in self.target(name):
                yield from _dag("", self.target(name), self.components).cached_steps()
            else:
                yield bool(task.get("cachingOptions", {}).get("enableCache"))


def _dag(name: str, component: Values, components: Values) -> _Dag:
    return _Dag(name, component["dag"].get("tasks", {}), component.get("inputDefinitions", {}), components)


def _dags(spec: Values) -> list[_Dag]:
    components: Values = spec.get("components", {})
    every = {"root": spec.get("root", {}), **components}
    return [_dag(name, component, components) for name, component in every.items() if "dag" in component]


def _pods(documents: list[Values]) -> Values:
    """Return the Kubernetes settings of each executor."""
    kubernetes: Values = documents[1].get("platforms", {}).get("kubernetes", {})
    return dict(kubernetes.get("deploymentSpec", {}).get("executors", {}))


def _containers(spec: Values) -> Values:
    """Return the container of each executor; an importer has none."""
    executors = spec.get("deploymentSpec", {}).get("executors", {})
    return {label: each["container"] for label, each in executors.items() if "container" in each}


def _used(container: Values) -> set[str]:
    """Return the parameters that a container's command or resources name."""
    texts = [*container.get("command", []), *container.get("args", []), str(container.get("resources", ""))]
    return {parameter for text in texts if isinstance(text, str) for parameter in _PARAMETER.findall(text)}


# --- references ---------------------------------------------------------------------------------------------------


def _dag_problems(dag: _Dag, spec: Values) -> list[str]:
    """Check that every reference resolves, that parameters are set, and that a step is not cached."""
    problems = []
    if dag.name != "root" and all(dag.cached_steps()):
        problems.append(f"{dag.name}: all its steps are cached; KFP leaves such a DAG in state RUNNING")
    for name, task in dag.tasks.items():
        where, key = f"task {name} in {dag.name}", task["componentRef"]["name"]
        target = dag.target(name)
        if not target:
            problems.append(f"{where}: component {key!r} does not exist")
            continue
        problems += [
            f"{where}: waits for task {other!r}, which does not exist"
            for other in task.get("dependentTasks", [])
            if other not in dag.tasks
        ]
        # KFP 2.17.0 fills in a container's arguments before it looks at the defaults of its parameters.
        used = _used(_containers(spec).get(target.get("executorLabel", ""), {}))
        item = task.get("parameterIterator", {}).get("itemInput")
        for kind in ("parameters", "artifacts"):
            wanted = target.get("inputDefinitions", {}).get(kind, {})
            bound = task.get("inputs", {}).get(kind, {})
            problems += [
                f"{where}: input {missing!r} of {key} is not set"
                for missing, definition in wanted.items()
                if missing not in bound and missing != item and (missing in used or not definition.get("isOptional"))
            ]
            for input_name, source in bound.items():
                fault = _source_fault(source, kind, dag) or _type_fault(source, wanted.get(input_name, {}), dag)
                if fault:
                    problems.append(f"{where}: input {input_name!r} {fault}")
        if "parameterIterator" in task and task.get("taskInfo", {}).get("name") != name:
            # KFP 2.15 keeps a loop's outputs under its title, and looks for them by its name.
            problems.append(f"{where}: a loop must have no name of its own")
    return problems


def _source_fault(source: Values, kind: str, dag: _Dag) -> str:
    """Tell what is wrong with where an input comes from; empty: nothing."""
    singular = kind.removesuffix("s").capitalize()
    inherited = source.get(f"componentInput{singular}")
    if inherited is not None and inherited not in dag.given.get(kind, {}):
        return f"comes from {inherited!r}, which the enclosing DAG does not have"
    produced = source.get(f"taskOutput{singular}")
    if produced is None:
        return ""
    task, key = produced["producerTask"], produced[f"output{singular}Key"]
    if task not in dag.tasks:
        return f"comes from task {task!r}, which is not in this DAG"
    made = dag.target(task).get("outputDefinitions", {}).get(kind, {})
    return "" if key in made else f"comes from output {key!r} of {task}, which does not exist"


def _type_fault(source: Values, wanted: Values, dag: _Dag) -> str:
    """Tell whether a parameter has another type than its source: KFP's driver refuses that, its compiler does not."""
    expected = _type(wanted)
    if expected in ("", "STRING"):
        return ""
    found = ""
    if (inherited := source.get("componentInputParameter")) and "parameterExpressionSelector" not in source:
        found = _type(dag.given.get("parameters", {}).get(inherited, {}))
    elif produced := source.get("taskOutputParameter"):
        made = dag.target(produced["producerTask"]).get("outputDefinitions", {}).get("parameters", {})
        found = _type(made.get(produced["outputParameterKey"], {}))
    return "" if found in ("", expected) else f"is {found}, and {expected} is expected"


def _type(definition: Values) -> str:
    """Return a parameter's type; whole numbers and others are one."""
    return str(definition.get("parameterType", "")).replace("_INTEGER", "").replace("_DOUBLE", "")


def _container_problems(spec: Values) -> list[str]:
    problems = []
    executors = spec.get("deploymentSpec", {}).get("executors", {})
    for name, component in spec.get("components", {}).items():
        label = component.get("executorLabel", "")
        if "dag" not in component and label not in executors:
            problems.append(f"component {name}: executor {label!r} does not exist")
        known = component.get("inputDefinitions", {}).get("parameters", {})
        problems += [
            f"component {name}: uses parameter {parameter!r}, which it does not have"
            for parameter in sorted(_used(_containers(spec).get(label, {})) - known.keys())
        ]
    return problems


def _image_problems(spec: Values) -> list[str]:
    """Check that every image has a version; a wrong one is one problem, however many components run in it."""
    containers = _containers(spec)
    users: dict[str, list[str]] = {}
    for name, component in spec.get("components", {}).items():
        if component.get("executorLabel", "") in containers:
            users.setdefault(containers[component["executorLabel"]]["image"], []).append(name)
    problems = []
    for image, names in users.items():
        version = image.rsplit("/", 1)[-1].partition(":")[2]
        if not _IMAGE.fullmatch(image):
            wrong = "is not the name of an image: REGISTRY/NAME:VERSION or REGISTRY/NAME@sha256:DIGEST"
        elif "@sha256:" not in image and version in ("", "latest"):
            wrong = "has neither version nor digest; write NAME:VERSION or NAME@sha256:DIGEST"
        else:
            continue
        others = f" (and {len(names) - 1} further components)" if len(names) > 1 else ""
        problems.append(f"component {names[0]}: image {image!r} {wrong}{others}")
    return problems


# --- Kubernetes' settings -----------------------------------------------------------------------------------------


def _platform_problems(spec: Values, pods: Values) -> list[str]:
    """Check that executors and parameters that the Kubernetes settings name exist where the driver looks for them."""
    known = spec["deploymentSpec"]["executors"]
    problems = [f"platform spec: executor {label!r} does not exist" for label in pods.keys() - known.keys()]
    for dag in _dags(spec):
        for name in dag.tasks:
            where = f"platform spec of task {name} in {dag.name}"
            sources = _references(pods.get(dag.target(name).get("executorLabel", ""), {}))
            faults = (_source_fault(source, "parameters", dag) for source in sources)
            problems += [f"{where}: {fault}" for fault in faults if fault]
    return problems


def _references(values: Any) -> Iterator[Values]:
    """Yield the parts that name a parameter."""
    if isinstance(values, dict) and {"componentInputParameter", "taskOutputParameter"} & values.keys():
        yield values
    for _, value in _items(values):
        yield from _references(value)


def _items(values: Any) -> list[tuple[str, Any]]:
    """Return the keys and values of a mapping, or the places and items of a list."""
    if isinstance(values, dict):
        return [(f".{key}", value) for key, value in values.items()]
    return [(f"[{index}]", value) for index, value in enumerate(values)] if isinstance(values, list) else []


def _gpu_problems(spec: Values, pods: Values) -> list[str]:
    """Check that steps with a GPU have shared memory, further attempts, and requests of their own."""
    problems = []
    for dag in _dags(spec):
        for name, task in dag.tasks.items():
            label = dag.target(name).get("executorLabel", "")
            wanted = _containers(spec).get(label, {}).get("resources", {})
            if "accelerator" not in wanted:
                continue
            mounts = pods.get(label, {}).get("emptyDirMounts", [])
            if not any(mount["mountPath"] == SHARED_MEMORY and mount.get("sizeLimit") for mount in mounts):
                problems.append(f"task {name} has a GPU and no {SHARED_MEMORY} of a given size")
            if not task.get("retryPolicy", {}).get("maxRetryCount"):
                problems.append(f"task {name} has a GPU and is not tried again after a failure")
            problems += [
                f"task {name} has a GPU and no {field}"
                for field in ("resourceCpuRequest", "resourceMemoryRequest", "resourceMemoryLimit")
                if not wanted.get(field)
            ]
    return problems


# --- secrets ------------------------------------------------------------------------------------------------------


def _secret_problems(documents: list[Values]) -> list[str]:
    """Find secrets whose values are in the pipeline: all who may read a pipeline or a run could read them."""
    spec = documents[0]
    problems = [
        f"executor {label}: environment variable {variable['name']} holds its value here, not in a Secret"
        for label, container in _containers(spec).items()
        for variable in container.get("env", [])
        if _SECRET_NAME.search(variable["name"])
    ]
    problems += [
        f"pipeline parameter {name!r}: a secret must not be a parameter, which the run's page shows"
        for name in spec["root"].get("inputDefinitions", {}).get("parameters", {})
        if _SECRET_NAME.search(name)
    ]
    return problems + [
        f"{place}: looks like a secret, {found.group()[:6]}..."
        for place, text in _texts(documents)
        if (found := _SECRET_VALUE.search(text))
    ]


def _texts(values: Any, place: str = "") -> Iterator[tuple[str, str]]:
    """Yield all texts, with the way to each."""
    if isinstance(values, str):
        yield place, values
    for step, value in _items(values):
        yield from _texts(value, place + step)
