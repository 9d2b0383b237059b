"""What must hold of a compiled pipeline as a cluster gets it: both documents together, by KFP's own definitions.

`skd_kfp.pipelines.lint` has the rules about references inside of the pipeline spec.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from google.protobuf import json_format
from google.protobuf.message import Message
from kfp.kubernetes.kubernetes_executor_config_pb2 import KubernetesExecutorConfig
from kfp.pipeline_spec.pipeline_spec_pb2 import PipelineDeploymentConfig, PipelineSpec, PlatformSpec

from skd_kfp.pipelines.lint import lint

SHARED_MEMORY = "/dev/shm"  # noqa: S108 - a mount point in the container
_DIGEST = re.compile(r"@sha256:[0-9a-f]{64}$")
_SECRET_NAME = re.compile(r"token|passw|secret|api_?key|access_?key|credential|webhook", re.IGNORECASE)
# How tokens of services begin that are used here, private keys, and URLs that contain a password or are one.
_SECRET_VALUE = re.compile(
    r"\bhf_[A-Za-z0-9]{20,}|\bsk-[A-Za-z0-9_-]{20,}|gh[pousr]_[A-Za-z0-9]{20,}|AKIA[0-9A-Z]{16}|AIza[0-9A-Za-z_-]{35}"
    r"|ya29\.[\w-]{20,}|xox[abprs]-[\w-]{10,}|-----BEGIN [A-Z ]*PRIVATE KEY|https://hooks\.slack\.com/services/\w+"
    r"|\b[a-z][a-z0-9+.-]*://[^/\s:@]+:[^/\s@]+@"
)


def lint_documents(documents: list[dict[str, Any]], *, release: bool = False) -> list[str]:
    """What is wrong with a compiled pipeline, one sentence each; empty if nothing is.

    Args:
        documents: The pipeline spec and the platform spec.
        release: It is to be released: every image must be named by its digest.
    """
    problems = _shape(documents)
    if problems:  # the other rules read what these find malformed
        return problems
    spec, executors = documents[0], _kubernetes(documents)
    problems = [*lint(spec), *_platform_references(spec, executors), *_gpu_steps(spec, executors), *_secrets(documents)]
    return [*problems, *_undigested(spec)] if release else problems


def _shape(documents: list[dict[str, Any]]) -> list[str]:
    """Fields that KFP does not know, or of another type."""
    if len(documents) != 2:
        return [f"there are {len(documents)} documents, not a pipeline spec and a platform spec"]
    spec, platform = documents
    parts: list[tuple[str, dict[str, Any], Message]] = [
        ("pipeline spec", spec, PipelineSpec()),
        ("pipeline spec, deploymentSpec", spec.get("deploymentSpec", {}), PipelineDeploymentConfig()),
        ("platform spec", platform, PlatformSpec()),
        *(
            (f"platform spec, executor {label}", settings, KubernetesExecutorConfig())
            for label, settings in _kubernetes(documents).items()
        ),
    ]
    return [f"{where}: {fault}" for where, values, message in parts if (fault := _parse_fault(values, message))]


def _parse_fault(values: dict[str, Any], message: Message) -> str:
    try:
        json_format.ParseDict(values, message)
    except json_format.ParseError as error:
        return " ".join(str(error).split())
    return ""


def _kubernetes(documents: list[dict[str, Any]]) -> dict[str, Any]:
    settings: dict[str, Any] = documents[1].get("platforms", {}).get("kubernetes", {})
    return dict(settings.get("deploymentSpec", {}).get("executors", {}))


def _tasks(spec: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any], str, dict[str, Any]]]:
    """Every container task: the name of its DAG, the DAG's component, its own name, itself."""
    components: dict[str, Any] = spec.get("components", {})
    for dag, component in {"root": spec["root"], **components}.items():
        for name, task in component.get("dag", {}).get("tasks", {}).items():
            if "executorLabel" in components.get(task["componentRef"]["name"], {}):
                yield dag, component, name, task


def _label(spec: dict[str, Any], task: dict[str, Any]) -> str:
    return str(spec["components"][task["componentRef"]["name"]]["executorLabel"])


def _platform_references(spec: dict[str, Any], executors: dict[str, Any]) -> list[str]:
    """Executors and parameters that the Kubernetes settings name must exist where the driver looks for them."""
    known = spec["deploymentSpec"]["executors"]
    problems = [f"platform spec: executor {label!r} does not exist" for label in executors if label not in known]
    for dag, component, name, task in _tasks(spec):
        given = component.get("inputDefinitions", {}).get("parameters", {})
        siblings = component["dag"]["tasks"]
        for kind, reference in _references(executors.get(_label(spec, task), {})):
            where = f"platform spec of task {name} in {dag}"
            if kind == "componentInputParameter" and reference not in given:
                problems.append(f"{where}: comes from {reference!r}, which the enclosing DAG does not have")
            elif kind == "taskOutputParameter" and reference["producerTask"] not in siblings:
                problems.append(f"{where}: comes from task {reference['producerTask']!r}, which is not in this DAG")
    return problems


def _references(values: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(values, dict):
        for key, value in values.items():
            if key in ("componentInputParameter", "taskOutputParameter"):
                yield key, value
            else:
                yield from _references(value)
    elif isinstance(values, list):
        for value in values:
            yield from _references(value)


def _gpu_steps(spec: dict[str, Any], executors: dict[str, Any]) -> list[str]:
    """A step that holds a GPU must neither die for want of shared memory, nor at once, nor take a node's memory."""
    problems = []
    for _, _, name, task in _tasks(spec):
        label = _label(spec, task)
        executor = spec["deploymentSpec"]["executors"].get(label, {})
        wanted = executor.get("container", {}).get("resources", {})
        if "accelerator" not in wanted:
            continue
        mounts = executors.get(label, {}).get("emptyDirMounts", [])
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


def _secrets(documents: list[dict[str, Any]]) -> list[str]:
    """Find secrets whose values are in the pipeline: all who may read a pipeline or a run could read them."""
    spec = documents[0]
    problems = [
        f"executor {label}: environment variable {variable['name']} holds its value here, not in a Secret"
        for label, executor in spec["deploymentSpec"]["executors"].items()
        for variable in executor.get("container", {}).get("env", [])
        if _SECRET_NAME.search(variable["name"])
    ]
    problems += [
        f"pipeline parameter {name!r}: a secret must not be a parameter, which the run's page shows"
        for name in spec["root"].get("inputDefinitions", {}).get("parameters", {})
        if _SECRET_NAME.search(name)
    ]
    for place, text in _texts(documents):
        if found := _SECRET_VALUE.search(text):
            problems.append(f"{place}: looks like a secret, {found.group()[:6]}...")
    return problems


def _texts(values: Any, place: str = "") -> Iterator[tuple[str, str]]:
    """All texts, with the way to each."""
    if isinstance(values, str):
        yield place, values
    elif isinstance(values, dict):
        for key, value in values.items():
            yield from _texts(value, f"{place}.{key}".lstrip("."))
    elif isinstance(values, list):
        for index, value in enumerate(values):
            yield from _texts(value, f"{place}[{index}]")


def _undigested(spec: dict[str, Any]) -> list[str]:
    executors = spec["deploymentSpec"]["executors"].values()
    images = {executor["container"]["image"] for executor in executors if "container" in executor}
    return [f"image {image!r} is not named by its digest" for image in sorted(images) if not _DIGEST.search(image)]
