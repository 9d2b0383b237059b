"""Build the node statuses of a run as Argo would keep them.

A component, the arguments of its task and its pod are written there as JSON within JSON, several times
(kubeflow/pipelines 2.17.0: backend/src/v2/compiler/argocompiler/{container,dag}.go and driver/driver.go; argo-workflows
4.0.8: workflow/controller/operator.go). The launcher's own arguments, the folder names and the metadata of artifacts
have their real lengths.
"""

from __future__ import annotations

import json
import re
import uuid
import zlib
from collections.abc import Callable, Mapping
from graphlib import TopologicalSorter
from typing import Any

from skd_kfp.pipelines.graph import awaited

Spec = Mapping[str, Any]
Outputs = Callable[[str, Spec, Spec], Spec]
"""(component, values of its inputs, its declared outputs) -> output parameters, of which some may be missing."""

_FILL = {"STRUCT": {}, "LIST": [], "BOOLEAN": False, "NUMBER_INTEGER": 10**6, "NUMBER_DOUBLE": 0.123456}
_TEXT = "x" * 64  # a fingerprint, a name
_ID = "00000000-0000-0000-0000-000000000000"
_SESSION = (
    '{"Provider":"minio","Params":{"accessKeyKey":"accesskey","disableSSL":"true","endpoint":'
    '"minio-service.kubeflow:9000","fromEnv":"false","region":"minio","secretKeyKey":"secretkey",'
    '"secretName":"mlpipeline-minio-artifact"}}'
)
_LAUNCH = (
    f"/kfp-launcher/launch --pipeline_name skd-distillation --run_id {_ID} --execution_id 100000 --pod_name "
    "$(KFP_POD_NAME) --pod_uid $(KFP_POD_UID) --publish_logs true --ml_pipeline_server_address "
    "ml-pipeline.kubeflow.svc.cluster.local --ml_pipeline_server_port 8887 --mlmd_server_address "
    "metadata-grpc-service.kubeflow.svc.cluster.local --mlmd_server_port 8080 --"
).split()
_RETRIES = {"max-count": "2", "backoff-duration": "60", "backoff-factor": "2", "backoff-max-duration": "1209600"}
_OUTPUTS = "/tmp/kfp/outputs"  # noqa: S108 - in the container
_DRIVEN = "/tmp/outputs"  # noqa: S108 - likewise
_PLACE = re.compile(r"\{\{\$\.inputs\.parameters\['(.+?)'\]\}\}")
_KEY = re.compile(r'^parseJson\(string_value\)\["(.+)"\]$')


class NodeStatuses:
    """The nodes of a run that has succeeded: as Argo writes them, and place and bytes of each argument of each step.

    Missing `outputs` of steps are filled in with short values. `wrapped`: each node has a second one for its retries.
    """

    def __init__(self, documents: list[dict[str, Any]], outputs: Outputs, wrapped: bool) -> None:
        self.spec = documents[0]
        self.name = self.spec["pipelineInfo"]["name"]
        platforms = documents[1]["platforms"] if len(documents) > 1 else {}
        self.kubernetes = platforms.get("kubernetes", {}).get("deploymentSpec", {}).get("executors", {})
        self.outputs, self.wrapped = outputs, wrapped
        self.nodes: list[dict[str, Any]] = []
        self.arguments: list[tuple[str, int]] = []
        self.stored: dict[str, str] = {}  # arguments of the workflow: components, implementations, Kubernetes' settings
        self.tasks: dict[tuple[str, str], str] = {}  # in the templates
        self.rounds = 0  # of the loop, as many as a list of its artifacts holds

    def run(self, parameters: Spec) -> NodeStatuses:
        """Add the nodes of a run with these parameters; the others have their defaults."""
        root = self.spec["root"]
        given = _defaults(root) | {name: value for name, value in parameters.items() if name in _parameters_of(root)}
        config = {"parameterValues": given, "gcsOutputDirectory": f"minio://mlpipeline/v2/artifacts/{self.name}/{_ID}"}
        self._add("Retry", "", "entrypoint", {})
        self._driver("root", {"component": self._keep("components-root", root), "runtime-config": to_json(config)})
        self._template("root.root", "root", {"parent-dag-id": "1"})
        self._dag("root", root, given, "root")
        return self

    def template_bytes(self) -> int:
        """Return the bytes of the workflow itself: the texts that nodes refer to, and the templates."""
        texts = [*self.stored.values(), *self.tasks.values()]
        return sum(len(to_json(text).encode()) for text in texts) + 800 * len(self.tasks) + 12_000

    def _dag(self, name: str, component: Spec, inputs: Spec, place: str) -> dict[str, Any]:
        """Add the nodes of a DAG, and return its output parameters."""
        tasks = component["dag"]["tasks"]
        made: dict[str, dict[str, Any]] = {}
        for key in TopologicalSorter({key: awaited(task) for key, task in tasks.items()}).static_order():
            self.tasks[name, key] = to_json(tasks[key])
            bound = tasks[key].get("inputs", {}).get("parameters", {})
            values = {parameter: _value(source, inputs, made) for parameter, source in bound.items()}
            made[key] = self._task(key, tasks[key], values, f"{place}.{key}")
        outputs = component["dag"].get("outputs", {}).get("parameters", {})
        chosen = {key: source["valueFromParameter"] for key, source in outputs.items()}
        return {key: made[each["producerSubtask"]][each["outputParameterKey"]] for key, each in chosen.items()}

    def _task(self, key: str, task: Spec, values: dict[str, Any], place: str) -> dict[str, Any]:
        name = task["componentRef"]["name"]
        component = self.spec["components"][name]
        own = {"component": self._keep(f"components-{name}", component), "task": to_json(task), "task-name": key}
        own["parent-dag-id"] = "100000"
        inside = {"parent-dag-id": "100000"}
        if "dag" not in component:
            return self._container(name, component, task, values, place, own)
        values = _defaults(component) | values
        if "parameterIterator" not in task:
            self._driver(place, own)
            self._template(place, name, inside)
            return self._dag(name, component, values, place)
        iterator = task["parameterIterator"]
        items = iterator["items"]
        many = json.loads(items["raw"]) if "raw" in items else values.pop(items["inputParameter"])
        self._template(place, f"{name}-{key}-iterator", inside)
        self._driver(f"{place}.iteration", own)
        self._add("TaskGroup", f"{place}.iteration-iterations", f"{name}-iteration", {})
        rounds = []
        for index, item in enumerate(json.loads(many) if isinstance(many, str) else many):
            path = f"{place}.iteration-iterations({index}:{index})"
            where = inside | {"iteration-index": str(index)}
            self._template(path, f"{name}-iteration", where)
            self._driver(f"{path}.iteration-item", own | where)
            self._template(f"{path}.iteration-item", name, inside)
            inner = values | {iterator["itemInput"]: item}
            rounds.append(self._dag(name, component, inner, f"{path}.iteration-item"))
        self.rounds = len(rounds)
        return {output: [each[output] for each in rounds] for output in (rounds[0] if rounds else ())}

    def _container(
        self, name: str, component: Spec, task: Spec, values: dict[str, Any], place: str, own: Spec
    ) -> dict[str, Any]:
        label = component["executorLabel"]
        container = self.spec["deploymentSpec"]["executors"][label]["container"]
        settings = self.kubernetes.get(label, {})
        given, declared = component.get("inputDefinitions", {}), component.get("outputDefinitions", {})
        files = {
            key: [self._artifact(key, f"{place} {number}", spec) for number in range(many)]
            for key, spec in given.get("artifacts", {}).items()
            for many in [self.rounds if spec.get("isArtifactList") else 1]
        }
        made = {key: [self._artifact(key, place, spec)] for key, spec in declared.get("artifacts", {}).items()}
        for artifact in (one for several in made.values() for one in several):
            artifact |= {"name": artifact["metadata"]["display_name"], "metadata": {}}  # before there is one
        # The server publishes the steps' logs there, with the manifests of all versions.
        logs = {"name": "executor-logs", "type": {"schemaTitle": "system.Artifact"}}
        made["executor-logs"] = [logs | {"uri": self._folder("executor-logs", place)}]
        executor_input = to_json(
            {
                "inputs": {"parameterValues": values, "artifacts": {k: {"artifacts": v} for k, v in files.items()}},
                "outputs": {
                    "parameters": {key: {"outputFile": f"{_OUTPUTS}/{key}"} for key in declared.get("parameters", {})},
                    "artifacts": {key: {"artifacts": several} for key, several in made.items()},
                    "outputFile": self._folder("output_metadata.json", place),
                },
            }
        )
        arguments = [_filled(part, values) for part in [*container.get("command", []), *container.get("args", [])]]
        self.arguments += [(f"{place} (KFP's own)", len(executor_input.encode()))]
        self.arguments += [(place, len(part.replace("{{$}}", executor_input).encode())) for part in arguments]
        launched = [*_LAUNCH, "--executor_input", executor_input, "--component_spec", to_json(component)]
        # Spelled as KFP does, without what it spells twice: a run's nodes come within 1 % of Kubernetes' spelling.
        wanted = {
            key: text
            for key, text in container.get("resources", {}).items()
            if key.startswith(("resource", "accelerator"))
        }
        main = container | {"name": "main", "command": launched, "args": arguments, "resources": wanted}
        secrets = [each | {"secretNameParameter": None} for each in settings.get("secretAsVolume", [])]
        patch = to_json({**settings, "containers": [main], "secretAsVolume": secrets})
        inputs = {**own, "container": self._keep(f"implementations-{name}", container)}
        if settings:
            inputs["kubernetes-config"] = self._keep(f"kubernetes-{name}", settings)
        self._driver(place, inputs, patch)
        retried = "retryPolicy" in task
        prefix, policy = ("retry-", {f"retry-{key}": text for key, text in _RETRIES.items()}) if retried else ("", {})
        named = {"pod-spec-patch": patch, **policy}
        self._template(place, f"{prefix}system-container-executor", named | {"cached-decision": "false"})
        self._template(f"{place}.executor", f"{prefix}system-container-impl", named, [], again=retried)
        parameters = declared.get("parameters", {})
        known = self.outputs(name.removeprefix("comp-"), values, declared)
        return {key: known.get(key, _FILL.get(spec["parameterType"], _TEXT)) for key, spec in parameters.items()}

    def _folder(self, key: str, place: str) -> str:
        own = uuid.uuid5(uuid.NAMESPACE_URL, place)
        return f"minio://mlpipeline/v2/artifacts/{self.name}/{_ID}/{place.rpartition('.')[2]}/{own}/{key}"

    def _artifact(self, key: str, place: str, spec: Spec) -> dict[str, Any]:
        metadata = {"display_name": key, "store_session_info": _SESSION}
        uri = self._folder(key, place)
        return {"name": "100000", "uri": uri, "type": spec["artifactType"], "metadata": metadata}

    def _driver(self, place: str, inputs: Spec, patch: str | None = None) -> None:
        values = {"execution-id": "100000", "iteration-count": "0", "condition": "true"}
        if patch is not None:
            values = {"pod-spec-patch": patch, "cached-decision": "false", "condition": "true"}
        outputs = [
            {"name": key, "value": value, "valueFrom": {"path": f"{_DRIVEN}/{key}", "default": ""}}
            for key, value in values.items()
        ]
        kind = "dag" if patch is None else "container"
        self._template(f"{place}-driver", f"system-{kind}-driver", inputs, outputs)

    def _template(
        self, place: str, template: str, inputs: Spec, pod: list[dict[str, Any]] | None = None, *, again: bool = False
    ) -> None:
        """Add the node of a template, of a pod with its outputs or of a DAG, and the one of its retries around it."""
        key = f"private-artifacts/kubeflow/{self.name}-abcde/2026/01/01/{self.name}-abcde/main.log"
        log = [{"name": "main-logs", "s3": {"key": key}}]
        done = {} if pod is None else {"parameters": pod, "artifacts": log, "exitCode": "0"}
        again = self.wrapped or again
        if again:
            self._add("Retry", place, template, inputs, done)
        self._add("DAG" if pod is None else "Pod", f"{place}(0)" if again else place, template, inputs, done)

    def _add(self, kind: str, place: str, template: str, inputs: Spec, outputs: Spec | None = None) -> None:
        identity = f"{self.name}-abcde-{zlib.crc32(f'{kind}{place}'.encode())}"
        node: dict[str, Any] = {
            "id": identity,
            "name": f"{self.name}-abcde.{place}",
            "displayName": place.rsplit(".", 1)[-1],
            "type": kind,
            "templateName": template,
            "templateScope": f"local/{self.name}-abcde",
            "phase": "Succeeded",
            "boundaryID": identity,
            "startedAt": "2026-01-01T00:00:00Z",
            "finishedAt": "2026-01-01T00:00:00Z",
            "progress": "10/10",
            "resourcesDuration": {"cpu": 10, "memory": 100},
            "nodeFlag": {"retried": True},
            "children": [identity, identity],
            "outboundNodes": [identity],
        }
        if kind == "Pod":
            node["hostNodeName"], node["taskResultSynced"] = "x" * 40, True
        if inputs:
            node["inputs"] = {"parameters": [{"name": key, "value": value} for key, value in inputs.items()]}
        if outputs:
            node["outputs"] = outputs
        self.nodes.append(node)

    def _keep(self, name: str, value: Any) -> str:
        return self.stored.setdefault(name, to_json(value))


def _parameters_of(component: Spec) -> Mapping[str, Any]:
    return component.get("inputDefinitions", {}).get("parameters", {})  # type: ignore[no-any-return]


def _defaults(component: Spec) -> dict[str, Any]:
    declared = _parameters_of(component)
    return {name: each["defaultValue"] for name, each in declared.items() if "defaultValue" in each}


def _filled(argument: str, values: Spec) -> str:
    found = {name: value if isinstance(value, str) else to_json(value) for name, value in values.items()}
    return _PLACE.sub(lambda place: found.get(place[1], ""), argument)


def _value(source: Spec, inputs: Spec, made: Mapping[str, Any]) -> Any:
    """Return the value of a task's parameter, or a text of its length."""
    if "componentInputParameter" in source:
        value = inputs.get(source["componentInputParameter"], _TEXT)
        if found := _KEY.match(source.get("parameterExpressionSelector", "")):
            return value[found[1]] if isinstance(value, dict) else _TEXT
        return value
    if "taskOutputParameter" in source:
        producer = source["taskOutputParameter"]
        return made[producer["producerTask"]][producer["outputParameterKey"]]
    constant = source.get("runtimeValue", {}).get("constant", _TEXT)  # without one: how the run has ended
    return _TEXT if isinstance(constant, str) and constant.startswith("{{$.") else constant


def to_json(value: Any) -> str:
    """Write a value as compactly as Kubernetes does."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False, sort_keys=True)
