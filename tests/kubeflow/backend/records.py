"""What the backend remembers: executions, artifacts, and the cache of steps that were done before."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Artifact:
    """An artifact. Each publication makes one with a number of its own, whatever its content (`RecordArtifact`)."""

    number: int
    uri: str
    type: str
    metadata: Mapping[str, Any]


@dataclass
class Execution:
    """A step or a DAG of a run (backend/src/v2/metadata/client.go).

    Attributes:
        state: RUNNING from its driver on, until something writes another word.
        total: Tasks of the DAG; for a loop the number of its iterations. 0 for a step.
    """

    number: int
    name: str
    component: str
    parent: Execution | None
    state: str = "RUNNING"
    inputs: dict[str, Any] = field(default_factory=dict)
    files: dict[str, list[Artifact]] = field(default_factory=dict)
    parameters: dict[str, Any] = field(default_factory=dict)
    artifacts: dict[str, Any] = field(default_factory=dict)
    children: list[Execution] = field(default_factory=list)
    total: int = 0
    is_loop: bool = False
    message: str = ""
    arguments: list[str] = field(default_factory=list)
    attempts: int = 0


class Records:
    """One installation: it outlives the runs."""

    def __init__(self) -> None:
        self.numbers = itertools.count(1)
        self.cache: dict[tuple[str, str, str], list[Execution]] = {}

    def execution(self, name: str, component: str, parent: Execution | None) -> Execution:
        """Record that a driver has begun with something."""
        made = Execution(next(self.numbers), name, component, parent)
        if parent:
            parent.children.append(made)
        return made

    def artifact(self, uri: str, kind: str, metadata: Mapping[str, Any]) -> Artifact:
        """Record an output."""
        return Artifact(next(self.numbers), uri, kind, metadata)

    def found(self, pipeline: str, namespace: str, key: str) -> Execution | None:
        """Look for a step that was done before: the newest (cacheutils/cache.go, `GetExecutionCache`; read).

        Nobody looks whether its artifacts still exist (seen).
        """
        return next(reversed(self.cache.get((pipeline, namespace, key), [])), None)

    def keep(self, pipeline: str, namespace: str, key: str, execution: Execution) -> None:
        """Remember a step that has gone well (`CreateExecutionCache`)."""
        self.cache.setdefault((pipeline, namespace, key), []).append(execution)


def cache_key(execution: Execution, component: Mapping[str, Any], container: Mapping[str, Any]) -> str:
    """Compute the key of a step (cacheutils/cache.go, `GenerateCacheKey`, 2.15.0 to 2.17.0; read, effects seen).

    It holds the values of the inputs that are passed, the *numbers* of the input artifacts, names and types of the
    outputs, and image, command and arguments as they were compiled. It does not hold what Kubernetes gets (node
    selectors, Secrets, ConfigMaps and their names), nor defaults of the component, nor content of artifacts.
    """
    outputs = component.get("outputDefinitions", {})
    key = {
        "parameters": execution.inputs,
        "artifacts": {name: [artifact.number for artifact in several] for name, several in execution.files.items()},
        "outputs": [outputs.get("artifacts", {}), outputs.get("parameters", {})],
        "container": [container["image"], container.get("command", []), container.get("args", [])],
    }
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
