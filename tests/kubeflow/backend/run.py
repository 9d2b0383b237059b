"""One run of a compiled pipeline through the backend."""

from __future__ import annotations

import heapq
import itertools
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from skd_kfp.pipelines.graph import awaited
from tests.kubeflow.backend.driver import DriverError, Resolver, triggers
from tests.kubeflow.backend.records import Artifact, Execution, Records, cache_key
from tests.kubeflow.backend.states import published
from tests.kubeflow.backend.versions import V2_17, Version

Spec = Mapping[str, Any]
STEP = 10  # time a step takes; a driver takes 1, whatever it does


class StepFailed(Exception):
    """A step ended with an exit code: its launcher publishes FAILED, and its log (seen). No artifact is published."""


class StepKilled(Exception):
    """A step died with its launcher (OOM, eviction, SIGTERM, deleted pod): nothing is published (seen)."""


@dataclass(frozen=True)
class Call:
    """What a step gets."""

    task: str
    component: str
    parameters: Mapping[str, Any]
    artifacts: Mapping[str, list[Artifact]]
    arguments: list[str]
    attempt: int
    outputs: Spec  # as the component declares them


@dataclass(frozen=True)
class Made:
    """What a step gives."""

    parameters: Mapping[str, Any] = field(default_factory=dict)
    metadata: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    without_file: frozenset[str] = frozenset()


Step = Callable[[Call], Made]


class Run:
    """A run that has ended.

    Attributes:
        state: What the API says: SUCCEEDED or FAILED (a cancelled run ends as FAILED; seen).
        told: What `finish` is told: the exit handler's DAG's state.
        done: Executions of steps, by task; of a loop's steps, one for each iteration.
        nodes: Phase of each step's node in Argo: Succeeded, Failed, Omitted, Skipped; `X-driver` where a driver failed.
    """

    def __init__(
        self,
        records: Records,
        documents: list[dict[str, Any]],
        parameters: Spec,
        step: Step,
        *,
        version: Version = V2_17,
        run_name: str = "a run",
        namespace: str = "team",
        retries: Callable[[Spec], int] = lambda task: 0,
        cancel_at: float = math.inf,
    ) -> None:
        self.records, self.spec, self.step, self.version = records, documents[0], step, version
        self.pipeline, self.namespace = self.spec["pipelineInfo"]["name"], namespace
        platform = documents[1]["platforms"]["kubernetes"]["deploymentSpec"] if len(documents) > 1 else {}
        self.kubernetes = platform.get("executors", {})
        self.retries, self.cancel_at = retries, cancel_at
        self.resolver = Resolver(version, {"name": run_name, "id": "run", "resource": "run-1"}, self.spec["components"])
        self.events: list[tuple[float, int, Callable[[], None]]] = []
        self.order, self.now = itertools.count(), 0.0
        self.told: dict[str, Any] = {}
        self.done: dict[str, list[Execution]] = {}
        self.nodes: dict[str, str] = {}
        self.pods: dict[str, dict[str, Any]] = {}  # what Kubernetes' settings resolve to, by task
        self.state = ""
        root = self.spec["root"]
        declared = root.get("inputDefinitions", {}).get("parameters", {})
        top = records.execution("root", "root", None)
        top.inputs = {key: parameters.get(key, spec.get("defaultValue")) for key, spec in declared.items()}
        _Dag(self, root, top, "", lambda ok: setattr(self, "state", "SUCCEEDED" if ok else "FAILED"))
        while self.events:
            self.now, _, then = heapq.heappop(self.events)
            then()

    def later(self, seconds: float, then: Callable[[], None]) -> None:
        heapq.heappush(self.events, (self.now + seconds, next(self.order), then))

    @property
    def cancelled(self) -> bool:
        return self.now >= self.cancel_at

    def states(self, task: str) -> list[str]:
        """Return how a task ended, once for each iteration."""
        return [execution.state for execution in self.done.get(task, [])]

    def ran(self) -> list[str]:
        """Return the tasks whose steps really ran, sorted, once for each iteration."""
        return sorted(task for task, several in self.done.items() for one in several if one.attempts)


class _Dag:
    """A DAG while it runs: Argo starts a task when all it depends on have Succeeded, nothing once one has failed."""

    def __init__(
        self, run: Run, component: Spec, execution: Execution, place: str, ended: Callable[[bool], None]
    ) -> None:
        self.run, self.execution, self.place, self.ended = run, execution, place, ended
        self.tasks: dict[str, Spec] = component["dag"]["tasks"]
        self.exits = {key for key, task in self.tasks.items() if "strategy" in task.get("triggerPolicy", {})}
        self.phases: dict[str, str] = {}  # in Argo
        self.siblings: dict[str, Execution] = {}
        self.advance()

    def advance(self) -> None:
        waiting = True
        while waiting:
            waiting = False
            for key, task in self.tasks.items():
                if key in self.phases or key in self.exits:
                    continue
                needed = [self.phases.get(other) for other in awaited(task)]
                if "Failed" in self.phases.values() or self.run.cancelled:
                    self.phases[key] = "Omitted"
                elif all(phase == "Succeeded" for phase in needed):
                    self.phases[key] = "Running"
                    self.run.later(1, lambda key=key, task=task: self.drive(key, task))  # type: ignore[misc]
                elif any(phase in ("Failed", "Omitted", "Skipped") for phase in needed):
                    self.phases[key] = "Omitted"
                else:
                    continue
                waiting = True
        self.run.nodes |= {f"{self.place}{key}": phase for key, phase in self.phases.items()}
        if "Running" not in self.phases.values():
            self.ended(not {"Failed", "Error"} & set(self.phases.values()))

    def drive(self, key: str, task: Spec) -> None:
        """Run a task's driver, then what it is."""
        run, name = self.run, task["componentRef"]["name"]
        component = run.spec["components"][name]
        if run.cancelled and key not in self.exits:
            return self.end(key, "Failed")
        try:
            inputs = run.resolver.parameters(task, component, self.execution, self.siblings)
            files = run.resolver.artifacts(task, self.execution, self.siblings)
            taken = triggers(task.get("triggerPolicy", {}).get("condition", ""), inputs)
        except DriverError as error:
            return self.fail(key, error)
        made = run.records.execution(key, name, self.execution)
        made.inputs, made.files = inputs, files
        self.siblings[key] = made
        if not taken:
            made.state = run.version.skipped
            published(made, run.version, by_driver=True)
            return self.end(key, "Skipped")
        if "parameterIterator" in task:
            return self.loop(key, task, component, made)
        if "dag" in component:
            made.total = len(component["dag"]["tasks"])
            _Dag(run, component, made, f"{self.place}{key}/", lambda ok: self.end(key, "Succeeded" if ok else "Failed"))
            return None
        return self.drive_step(key, task, component, made)

    def loop(self, key: str, task: Spec, component: Spec, made: Execution) -> None:
        """Start all iterations side by side."""
        iterator = task["parameterIterator"]
        items = iterator["items"]
        given = items["raw"] if "raw" in items else made.inputs.pop(items["inputParameter"])
        rounds = json.loads(given) if isinstance(given, str) else given
        made.is_loop, made.total = True, len(rounds)
        left = dict.fromkeys(range(len(rounds)), "Running")

        def over(index: int, ok: bool) -> None:
            left[index] = "Succeeded" if ok else "Failed"
            if "Running" not in left.values():
                self.end(key, "Failed" if "Failed" in left.values() else "Succeeded")

        for index, item in enumerate(rounds):
            one = self.run.records.execution(key, task["componentRef"]["name"], made)
            one.inputs, one.files = {**made.inputs, iterator["itemInput"]: item}, made.files
            one.total = len(component["dag"]["tasks"])
            _Dag(self.run, component, one, f"{self.place}{key}[{index}]/", lambda ok, index=index: over(index, ok))  # type: ignore[misc]
        if not rounds:
            self.end(key, "Skipped")

    def drive_step(self, key: str, task: Spec, component: Spec, made: Execution) -> None:
        """Look into the cache, and start the step where it has nothing."""
        run = self.run
        container = run.spec["deploymentSpec"]["executors"][component["executorLabel"]]["container"]
        run.done.setdefault(key, []).append(made)
        fingerprint = ""
        if task.get("cachingOptions", {}).get("enableCache"):
            fingerprint = cache_key(made, component, container)
            if before := run.records.found(run.pipeline, run.namespace, fingerprint):
                made.state, made.parameters, made.artifacts = "CACHED", before.parameters, before.artifacts
                published(made, run.version, by_driver=True)
                return self.end(key, "Succeeded")
        try:
            made.arguments = run.resolver.arguments(container, component, made.inputs)
            run.pods[key] = self.pod(run.kubernetes.get(component["executorLabel"], {}))
        except DriverError as error:
            return self.fail(key, error)
        run.later(STEP, lambda: self.attempt(key, task, component, made, fingerprint))
        return None

    def pod(self, settings: Spec) -> dict[str, Any]:
        """Resolve the Kubernetes settings that are parameters (driver/k8s.go), among those of the DAG.

        The name of a ConfigMap must be a text that is not empty (`resolveInputParameterStr`; read).
        """
        resolve = self.run.resolver.parameter
        found: dict[str, Any] = {"config_maps": []}
        for config_map in settings.get("configMapAsEnv", []) + settings.get("configMapAsVolume", []):
            name = resolve(config_map["configMapNameParameter"], self.execution, self.siblings)
            if not isinstance(name, str) or not name:
                raise DriverError("failed to resolve configmap name: Expected a non-empty string")
            found["config_maps"].append(name)
        if source := settings.get("nodeSelector", {}).get("nodeSelectorJson"):
            found["node_selector"] = resolve(source, self.execution, self.siblings)
        return found

    def attempt(self, key: str, task: Spec, component: Spec, made: Execution, fingerprint: str) -> None:
        """Run the step, and publish what came of it."""
        run, declared = self.run, component.get("outputDefinitions", {})
        if run.cancelled and key not in self.exits:
            made.attempts += 1
            return self.end(key, "Failed")  # killed: nothing is published
        call = Call(key, made.component, made.inputs, made.files, made.arguments, made.attempts, declared)
        made.attempts += 1
        if "status" in made.inputs:
            run.told = made.inputs["status"]
        try:
            given = run.step(call)
            self.accept(given, declared)
        except (StepFailed, StepKilled) as error:
            if isinstance(error, StepFailed):
                made.state, made.message = "FAILED", str(error)
                published(made, run.version)
            if made.attempts <= run.retries(task):
                run.later(STEP, lambda: self.attempt(key, task, component, made, fingerprint))
                return None
            return self.end(key, "Failed")
        made.parameters = dict(given.parameters)
        for name, spec in declared.get("artifacts", {}).items():
            uri = f"minio://mlpipeline/v2/artifacts/{run.pipeline}/run/{key}/{made.number}/{name}"
            metadata = {"display_name": name, "store_session_info": "{}", **given.metadata.get(name, {})}
            made.artifacts[name] = run.records.artifact(uri, spec["artifactType"]["schemaTitle"], metadata)
        made.state = run.version.complete
        if fingerprint:
            run.records.keep(run.pipeline, run.namespace, fingerprint, made)
        published(made, run.version)
        return self.end(key, "Succeeded")

    def accept(self, given: Made, declared: Spec) -> None:
        """Read a step's outputs as the launcher does (component/launcher_v2.go): NaN and null in metadata, and a
        parameter that is missing, fail the step after its work (seen)."""
        numbers = [given.parameters, *given.metadata.values()]
        if "NaN" in json.dumps(numbers) or "Infinity" in json.dumps(numbers):
            raise StepFailed("failed to unmarshall ExecutorOutput: invalid value NaN")
        if any(value is None for several in given.metadata.values() for value in several.values()):
            raise StepFailed("unknown/unsupported value type *structpb.Value_NullValue")
        if missing := declared.get("parameters", {}).keys() - given.parameters.keys():
            raise StepFailed(f"failed to read output parameter name={min(missing)!r}")
        if not self.run.version.metadata and given.without_file:
            raise StepFailed(f"failed to upload output artifact {min(given.without_file)!r}")

    def fail(self, key: str, error: DriverError) -> None:
        """Note that a driver failed: its task is Omitted, and has no exit task then (Argo, `executeDAGTask`; read)."""
        self.run.nodes[f"{self.place}{key}-driver"] = f"Failed: {error}"
        self.phases |= {name: "Omitted" for name in self.exits if key in self.tasks[name]["dependentTasks"]}
        self.phases[key] = "Failed"
        self.advance()
        self.run.nodes[f"{self.place}{key}"] = "Omitted"

    def end(self, key: str, phase: str) -> None:
        """Note how a task ended in Argo; an exit task runs after the one it waits for, however that ended."""
        if key in self.exits:
            self.phases[key] = phase
            return self.advance()
        for name in self.exits - self.phases.keys():
            task = self.tasks[name]
            if key in task["dependentTasks"]:
                self.phases[name] = "Running"
                self.run.later(1, lambda name=name, task=task: self.drive(name, task))  # type: ignore[misc]
        self.phases[key] = phase
        return self.advance()
