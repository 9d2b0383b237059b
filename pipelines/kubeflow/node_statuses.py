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
_LOGS = "executor-logs"
_OUTPUTS = "/tmp/kfp/outputs"  # noqa: S108 - in the container
_DRIVEN = "/tmp/outputs"  # noqa: S108 - likewise


class NodeStatuses:
    """The nodes of a run that has succeeded.

    Args:
        documents: The compiled pipeline.
        outputs: The output parameters of steps; missing ones are filled in with short values.
        wrapped: Whether each node has a second one around it, for its retries.

    Attributes:
        nodes: As Argo writes them.
        arguments: Place and bytes of each argument of each step.
    """

    def __init__(self, documents: list[dict[str, Any]], outputs: Outputs, wrapped: bool) -> None:
        self.spec = documents[0]
        pipeline = self.spec["pipelineInfo"]["name"]
        self.name = f"{pipeline}-abcde"
        self.folder = f"minio://mlpipeline/v2/artifacts/{pipeline}/{_ID}"
        platforms = documents[1] if len(documents) > 1 else {}
        deployment = platforms.get("platforms", {}).get("kubernetes", {}).get("deploymentSpec", {})
        self.kubernetes = deployment.get("executors", {})
        self.outputs, self.wrapped = outputs, wrapped
        self.nodes: list[dict[str, Any]] = []
        self.arguments: list[tuple[str, int]] = []
        self.stored: dict[str, str] = {}  # arguments of the workflow: components, implementations, Kubernetes' settings
        self.tasks: dict[tuple[str, str], str] = {}  # in the templates

    def run(self, parameters: Spec) -> NodeStatuses:
        """Add the nodes of a run with these parameters; the others have their defaults."""
        root = self.spec["root"]
        given = {
            name: parameters.get(name, declared.get("defaultValue"))
            for name, declared in root.get("inputDefinitions", {}).get("parameters", {}).items()
        }
        config = {"parameterValues": given, "gcsOutputDirectory": self.folder}
        self._add("Retry", "", "entrypoint", {})
        self._driver(
            "root-driver", {"component": self._keep("components-root", root), "runtime-config": to_json(config)}
        )
        self._template("root.root", "root", {"parent-dag-id": "1"}, pod=False)
        self._dag("root", root, {name: value for name, value in given.items() if value is not None}, {}, "root")
        return self

    def _dag(self, name: str, component: Spec, inputs: Spec, artifacts: Spec, place: str) -> dict[str, dict[str, Any]]:
        """Add the nodes of a DAG, and return its outputs: parameters and artifacts by name."""
        tasks = component["dag"]["tasks"]
        order = TopologicalSorter({key: awaited(task) for key, task in tasks.items()})
        made: dict[str, dict[str, dict[str, Any]]] = {}
        for key in order.static_order():
            task = tasks[key]
            self.tasks[name, key] = to_json(task)
            values = {k: _parameter(v, inputs, made) for k, v in task.get("inputs", {}).get("parameters", {}).items()}
            files = {k: _artifact(v, artifacts, made) for k, v in task.get("inputs", {}).get("artifacts", {}).items()}
            made[key] = self._task(key, task, values, files, f"{place}.{key}")
        declared = component["dag"].get("outputs", {})
        found: dict[str, dict[str, Any]] = {"parameters": {}, "artifacts": {}}
        for key, chosen in declared.get("parameters", {}).items():
            producer = chosen["valueFromParameter"]
            found["parameters"][key] = made[producer["producerSubtask"]]["parameters"][producer["outputParameterKey"]]
        for key, chosen in declared.get("artifacts", {}).items():
            producer = chosen["artifactSelectors"][0]
            found["artifacts"][key] = made[producer["producerSubtask"]]["artifacts"][producer["outputArtifactKey"]]
        return found

    def _task(self, key: str, task: Spec, values: dict[str, Any], files: Spec, place: str) -> dict[str, dict[str, Any]]:
        name = task["componentRef"]["name"]
        component = self.spec["components"][name]
        own = {"component": self._keep(f"components-{name}", component), "task": to_json(task), "task-name": key}
        own["parent-dag-id"] = "100000"
        if iterator := task.get("parameterIterator"):
            items = iterator["items"]
            many = json.loads(items["raw"]) if "raw" in items else values.pop(items["inputParameter"])
            self._template(place, f"{name}-{key}-iterator", {"parent-dag-id": "100000"}, pod=False)
            self._driver(f"{place}.iteration-driver", own)
            self._add("TaskGroup", f"{place}.iteration-iterations", f"{name}-iteration", {})
            rounds = []
            for index, item in enumerate(json.loads(many) if isinstance(many, str) else many):
                path = f"{place}.iteration-iterations({index}:{index})"
                where = {"parent-dag-id": "100000", "iteration-index": str(index)}
                self._template(path, f"{name}-iteration", where, pod=False)
                self._driver(f"{path}.iteration-item-driver", own | where)
                self._template(f"{path}.iteration-item", name, {"parent-dag-id": "100000"}, pod=False)
                inner = {**values, iterator["itemInput"]: item}
                rounds.append(self._dag(name, component, inner, files, f"{path}.iteration-item"))
            return _collected(rounds)
        if "dag" in component:
            self._driver(f"{place}-driver", own)
            self._template(place, name, {"parent-dag-id": "100000"}, pod=False)
            defaults = component.get("inputDefinitions", {}).get("parameters", {})
            filled = {k: v["defaultValue"] for k, v in defaults.items() if "defaultValue" in v} | values
            return self._dag(name, component, filled, files, place)
        return self._container(name, component, task, values, files, place, own)

    def _container(
        self, name: str, component: Spec, task: Spec, values: dict[str, Any], files: Spec, place: str, own: Spec
    ) -> dict[str, dict[str, Any]]:
        label = component["executorLabel"]
        container = self.spec["deploymentSpec"]["executors"][label]["container"]
        settings = self.kubernetes.get(label, {})
        declared = component.get("outputDefinitions", {})
        folder = f"{self.folder}/{own['task-name']}/{uuid.uuid5(uuid.NAMESPACE_URL, place)}"
        made = {
            key: [{"name": key, "uri": f"{folder}/{key}", "type": spec["artifactType"], "metadata": {}}]
            for key, spec in declared.get("artifacts", {}).items()
        }
        # The server publishes the steps' logs there, with the manifests of all versions.
        logs = {_LOGS: [{"name": _LOGS, "uri": f"{folder}/{_LOGS}", "type": {"schemaTitle": "system.Artifact"}}]}
        executor_input = {
            "inputs": {"parameterValues": values, "artifacts": {k: {"artifacts": v} for k, v in files.items()}},
            "outputs": {
                "parameters": {k: {"outputFile": f"{_OUTPUTS}/{k}"} for k in declared.get("parameters", {})},
                "artifacts": {key: {"artifacts": value} for key, value in {**made, **logs}.items()},
                "outputFile": folder.replace("minio://", "/minio/") + "/output_metadata.json",
            },
        }
        text = to_json(executor_input)
        arguments = [_resolved(part, values) for part in [*container.get("command", []), *container.get("args", [])]]
        self.arguments += [(f"{place} (KFP's own)", len(text.encode()))]
        self.arguments += [(place, len(part.replace("{{$}}", text).encode())) for part in arguments]
        patch = to_json(_pod(container, settings, arguments, text, to_json(component)))
        inputs = {**own, "container": self._keep(f"implementations-{name}", container)}
        if settings:
            inputs["kubernetes-config"] = self._keep(f"kubernetes-{name}", settings)
        self._driver(f"{place}-driver", inputs, patch)
        retried = "retryPolicy" in task
        policy = {"retry-max-count": "2", "retry-backoff-duration": "60", "retry-backoff-factor": "2"}
        policy["retry-backoff-max-duration"] = "1209600"
        extra = policy if retried else {}
        prefix = "retry-" if retried else ""
        named = {"pod-spec-patch": patch, "cached-decision": "false", **extra}
        self._template(place, f"{prefix}system-container-executor", named, pod=False)
        pod = {"pod-spec-patch": patch, **extra}
        self._template(f"{place}.executor", f"{prefix}system-container-impl", pod, pod=True, retried=retried)
        for artifact in (artifact for several in made.values() for artifact in several):
            # KFP adds this once an artifact exists; its name is then its number.
            artifact["metadata"] = {"display_name": artifact["name"], "store_session_info": _SESSION}
            artifact["name"] = "100000"
        parameters = declared.get("parameters", {})
        known = self.outputs(name.removeprefix("comp-"), values, declared)
        given = {key: known.get(key, _FILL.get(spec["parameterType"], _TEXT)) for key, spec in parameters.items()}
        return {"parameters": given, "artifacts": made}

    def _driver(self, place: str, inputs: Spec, patch: str | None = None) -> None:
        paths = ["execution-id", "iteration-count", "condition"]
        if patch is not None:
            paths = ["pod-spec-patch", "cached-decision", "condition"]
        values = {"execution-id": "100000", "iteration-count": "0", "condition": "true", "cached-decision": "false"}
        outputs = [
            {"name": key, "value": values.get(key, patch), "valueFrom": {"path": f"{_DRIVEN}/{key}", "default": ""}}
            for key in paths
        ]
        kind = "dag" if patch is None else "container"
        self._template(place, f"system-{kind}-driver", inputs, pod=True, outputs=outputs)

    def _template(
        self,
        place: str,
        template: str,
        inputs: Spec,
        *,
        pod: bool,
        retried: bool = False,
        outputs: list[dict[str, Any]] | None = None,
    ) -> None:
        """Add the node of a template, and the one of its retries around it."""
        key = f"private-artifacts/kubeflow/{self.name}/2026/01/01/{self.name}/main.log"
        log = [{"name": "main-logs", "s3": {"key": key}}]
        done = {"parameters": outputs or [], "artifacts": log, "exitCode": "0"} if pod else {}
        again = self.wrapped or retried
        if again:
            self._add("Retry", place, template, inputs, done)
        self._add("Pod" if pod else "DAG", f"{place}(0)" if again else place, template, inputs, done)

    def _add(self, kind: str, place: str, template: str, inputs: Spec, outputs: Spec | None = None) -> None:
        identity = f"{self.name}-{zlib.crc32(f'{kind}{place}'.encode())}"
        node: dict[str, Any] = {
            "id": identity,
            "name": f"{self.name}.{place}",
            "displayName": place.rsplit(".", 1)[-1],
            "type": kind,
            "templateName": template,
            "templateScope": f"local/{self.name}",
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

    def template_bytes(self) -> int:
        """Return the bytes of the workflow itself: the texts that nodes refer to, and the templates."""
        texts = [*self.stored.values(), *self.tasks.values()]
        return sum(len(to_json(text).encode()) for text in texts) + 800 * len(self.tasks) + 12_000


def _pod(container: Spec, settings: Spec, arguments: list[str], executor_input: str, component: str) -> dict[str, Any]:
    """Return the part of the pod that the driver writes.

    Resources and settings are spelled as KFP does, without what it spells twice: a run's nodes come within 1 % of what
    they are with Kubernetes' spelling.
    """
    server = ["--ml_pipeline_server_address", "ml-pipeline.kubeflow.svc.cluster.local"]
    server += ["--ml_pipeline_server_port", "8887"]
    database = ["--mlmd_server_address", "metadata-grpc-service.kubeflow.svc.cluster.local"]
    database += ["--mlmd_server_port", "8080"]
    run = ["--pipeline_name", "skd-distillation", "--run_id", _ID, "--execution_id", "100000"]
    pod = ["--pod_name", "$(KFP_POD_NAME)", "--pod_uid", "$(KFP_POD_UID)", "--publish_logs", "true"]
    launcher = ["/kfp-launcher/launch", *run, "--executor_input", executor_input, "--component_spec", component]
    resources = container.get("resources", {})
    main = {
        "name": "main",
        "image": container["image"],
        "command": [*launcher, *pod, *server, *database, "--"],
        "args": arguments,
        "env": container.get("env", []),
        "resources": {key: value for key, value in resources.items() if key.startswith(("resource", "accelerator"))},
    }
    secrets = [{**each, "secretNameParameter": None} for each in settings.get("secretAsVolume", [])]
    return {"containers": [main], **settings, "secretAsVolume": secrets}


_PLACE = re.compile(r"\{\{\$\.inputs\.parameters\['(.+?)'\]\}\}")
_KEY = re.compile(r'^parseJson\(string_value\)\["(.+)"\]$')


def _resolved(argument: str, values: Spec) -> str:
    return _PLACE.sub(lambda found: _text(values.get(found[1], "")), argument)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else to_json(value)


def _parameter(source: Spec, inputs: Spec, made: Mapping[str, Any]) -> Any:
    if "componentInputParameter" in source:
        value = inputs.get(source["componentInputParameter"], _TEXT)
        if found := _KEY.match(source.get("parameterExpressionSelector", "")):
            return value[found[1]] if isinstance(value, dict) else _TEXT
        return value
    if "taskOutputParameter" in source:
        producer = source["taskOutputParameter"]
        return made[producer["producerTask"]]["parameters"][producer["outputParameterKey"]]
    if "runtimeValue" in source:
        constant = source["runtimeValue"]["constant"]
        return _TEXT if isinstance(constant, str) and constant.startswith("{{$.") else constant
    return {
        "state": "COMPLETE",
        "pipelineJobResourceName": f"skd-distillation-{_ID}",
        "pipelineTaskName": "exit-handler-1",
        "error": {},
    }


def _artifact(source: Spec, inputs: Spec, made: Mapping[str, Any]) -> Any:
    if "componentInputArtifact" in source:
        return inputs[source["componentInputArtifact"]]
    producer = source["taskOutputArtifact"]
    return made[producer["producerTask"]]["artifacts"][producer["outputArtifactKey"]]


def _collected(rounds: list[dict[str, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Return lists of the outputs of a loop's rounds."""
    first = rounds[0] if rounds else {"parameters": {}, "artifacts": {}}
    return {
        "parameters": {key: [given["parameters"][key] for given in rounds] for key in first["parameters"]},
        "artifacts": {key: [a for given in rounds for a in given["artifacts"][key]] for key in first["artifacts"]},
    }


def to_json(value: Any) -> str:
    """Write a value as compactly as Kubernetes does."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False, sort_keys=True)
