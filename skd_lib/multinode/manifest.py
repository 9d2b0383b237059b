"""The `TrainJob`, and the pods of vLLM servers, as pure functions of the step's own pod and the configuration.

A node is like the step's own pod: the same image, service account, environment and place, but for `MultinodeConfig`. A
server's pod has its place, and none of its rights and Secrets.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

from skd_lib._core.machine import RUN_ID_VARIABLE
from skd_lib.config import EnginePodsConfig, MultinodeConfig
from skd_lib.config.training import PodsConfig
from skd_lib.vllm.guard import TOKEN_VARIABLE
from skd_lib.vllm.pod import ADDRESS_VARIABLE, PORT

GROUP, VERSION, PLURAL = "trainer.kubeflow.org", "v1alpha1", "trainjobs"
NODE = "node"
"""Name of the replicated job, and of its container, in Trainer's runtimes."""
RUN_LABEL = "skd/run-id"
"""Label of a job, by which those of a pipeline run are found."""
SERVER = "skd-engine"
"""Name of vLLM's servers, in the label `app.kubernetes.io/name`; the network policy goes by it."""
STEP_ANNOTATION = "skd/step-pod"
"""Annotation of a server: the name of the step's pod that has made it."""
_LABEL_VALUE = re.compile(r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?")
_NAME_DIGITS = 16
# The runtime sets PET_* itself and refuses them; the variables of Kubeflow Pipelines and Argo are of the step's pod.
_OWN = ("PET_", "KFP_", "ARGO_")
_PART = {"app.kubernetes.io/part-of": "skd"}
_SHARED_MEMORY, _SCRATCH = "skd-shared-memory", "skd-scratch"


def job_name(step: str, run_id: str, work: Any) -> str:
    """Return the name of a step's job: the same for each attempt at the same work in the same pipeline run.

    Kubernetes makes pod names of it (`NAME-node-0-0-abcde`, at most 63 characters), so it is kept short. `work` has the
    step's options and inputs, as JSON values.
    """
    text = json.dumps([step, run_id, work], sort_keys=True)
    return f"skd-{step.replace('_', '-')}-{hashlib.sha256(text.encode()).hexdigest()[:_NAME_DIGITS]}"


def run_label(run_id: str) -> str:
    """Return the value of `RUN_LABEL`: the run's id, or a digest of one that no label can hold."""
    if _LABEL_VALUE.fullmatch(run_id):
        return run_id
    return hashlib.sha256(run_id.encode()).hexdigest()[: 2 * _NAME_DIGITS]


def train_job(
    name: str, settings: MultinodeConfig, pod: Mapping[str, Any], *, run_id: str, arguments: list[str]
) -> dict[str, Any]:
    """Return the job's manifest: nodes like the step's own pod but for the settings.

    `pod` is as Kubernetes' API shows it; the nodes track under `run_id`. `arguments` of `skd_lib.multinode.node` must
    hold no `$(`, which Kubernetes would expand.
    """
    container = step_container(pod)
    resources = _resources(container, settings)
    trainer: dict[str, Any] = {
        "image": container["image"],
        "command": ["python3", "-m", "skd_lib.multinode.node"],
        "args": arguments,
        "numNodes": settings.nodes,
        # Never left to the runtime: its `auto` counts CPU cores where it sees no GPU.
        "numProcPerNode": settings.processes_per_node or max(1, gpus(resources)),
        "env": [*_environment(container), {"name": RUN_ID_VARIABLE, "value": run_id}],
    }
    if resources:
        trainer["resourcesPerNode"] = resources
    spec: dict[str, Any] = {
        "runtimeRef": {"apiGroup": GROUP, "kind": settings.runtime_kind, "name": settings.runtime},
        "trainer": trainer,
    }
    template = {
        # A mesh's proxy would stand between the processes, and outlive them.
        "metadata": {"labels": {"sidecar.istio.io/inject": "false"}},
        "spec": _pod_spec(pod, settings, *_files(pod)),
    }
    if settings.trainer_version == "2.1":
        spec["podTemplateOverrides"] = [{"targetJobs": [{"name": NODE}], **template}]
    else:
        replicated = {"name": NODE, "template": {"spec": {"template": template}}}
        patch = {"template": {"spec": {"replicatedJobs": [replicated]}}}
        spec["runtimePatches"] = [{"manager": "skd/distillation", "trainingRuntimeSpec": patch}]
        if settings.timeout_hours is not None:
            spec["activeDeadlineSeconds"] = max(1, round(settings.timeout_hours * 3600))
    return {
        "apiVersion": f"{GROUP}/{VERSION}",
        "kind": "TrainJob",
        "metadata": {
            "name": name,
            "labels": {**_PART, **settings.labels, RUN_LABEL: run_label(run_id)},
            "annotations": {RUN_LABEL: run_id},
        },
        "spec": spec,
    }


TRIAL_POD = {
    "metadata": {"name": "preflight", "uid": "preflight"},
    "spec": {"containers": [{"name": "main", "image": "skd-train"}]},
}
"""A pod that asks for nothing, for manifests that Kubernetes only checks."""


def trial_job(settings: MultinodeConfig) -> dict[str, Any]:
    """Make a job for Kubernetes and Trainer to check."""
    return train_job("skd-preflight", settings, TRIAL_POD, run_id="preflight", arguments=[])


def server_name(pod: Mapping[str, Any]) -> str:
    """Return the name of what a step's pod makes for its servers: another one for each attempt at the step."""
    return f"{SERVER}-{hashlib.sha256(str(pod['metadata']['uid']).encode()).hexdigest()[:_NAME_DIGITS]}"


def server_secret(pod: Mapping[str, Any], run_id: str, token: str) -> dict[str, Any]:
    """Return the Secret with the token of a step's servers."""
    metadata = _owned(pod, server_name(pod), run_id)
    return {"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "stringData": {"token": token}}


def server_pods(
    pod: Mapping[str, Any], settings: EnginePodsConfig, *, run_id: str, image: str, gpus: int
) -> list[dict[str, Any]]:
    """Return the pods of a step's servers.

    They end with the step's pod, may not ask Kubernetes anything, and have no Secret but their token's. A container
    that ends starts again in its pod, with the models that it was given.

    Args:
        pod: The step's own, as Kubernetes' API shows it.
        settings: What a pod asks for, and its place.
        run_id: Of the pipeline run.
        image: Their image.
        gpus: For a pod, where the step has any and `settings` do not say.
    """
    name = server_name(pod)
    resources = _resources(step_container(pod), settings)
    if settings.resources is None:
        for amounts in resources.values():
            amounts.update({kind: str(gpus) for kind in amounts if kind.endswith("/gpu")})
    spec = _pod_spec(pod, settings, [], [])
    (container,) = spec["containers"]
    container |= {
        "image": image,
        "command": ["python3", "-m", "skd_lib.vllm.pod"],
        "env": [
            {"name": TOKEN_VARIABLE, "valueFrom": {"secretKeyRef": {"name": name, "key": "token"}}},
            {"name": ADDRESS_VARIABLE, "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
        ],
        "ports": [{"name": "engine", "containerPort": PORT}],
        "resources": resources,
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
    }
    spec |= {
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,  # vLLM reads VLLM_PORT, which a Service called `vllm` would set
        "securityContext": {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}},
    }
    metadata = [_owned(pod, f"{name}-{number}", run_id) for number in range(settings.count)]
    return [{"apiVersion": "v1", "kind": "Pod", "metadata": each, "spec": spec} for each in metadata]


def _owned(pod: Mapping[str, Any], name: str, run_id: str) -> dict[str, Any]:
    own = pod["metadata"]
    labels = {"app.kubernetes.io/name": SERVER, RUN_LABEL: run_label(run_id), "sidecar.istio.io/inject": "false"}
    return {
        "name": name,
        "labels": {**_PART, **labels},
        "annotations": {RUN_LABEL: run_id, STEP_ANNOTATION: own["name"]},
        "ownerReferences": [{"apiVersion": "v1", "kind": "Pod", "name": own["name"], "uid": own["uid"]}],
    }


def step_container(pod: Mapping[str, Any]) -> dict[str, Any]:
    """Return the container of a pipeline's pod that the step runs in: Argo calls it `main`."""
    containers: list[dict[str, Any]] = pod["spec"]["containers"]
    return next((each for each in containers if each["name"] == "main"), containers[0])


def gpus(resources: Mapping[str, Any]) -> int:
    """Count the accelerators among a container's limits (`nvidia.com/gpu`, `amd.com/gpu`)."""
    return sum(int(count) for name, count in resources.get("limits", {}).items() if name.endswith("/gpu"))


def _resources(container: Mapping[str, Any], settings: PodsConfig) -> dict[str, Any]:
    """Return limits and requests, always both: without requests Trainer may start one process a node."""
    if settings.resources is None:
        given = container.get("resources", {})
        limits, requests = dict(given.get("limits", {})), dict(given.get("requests", {}))
    else:
        requests = dict(settings.resources)
        limits = {name: amount for name, amount in requests.items() if name != "cpu"}
    requests = {**limits, **requests}
    return {"limits": limits or requests, "requests": requests} if requests else {}


def _environment(container: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the step's variables, references to secrets and config maps included; not those of its pod's fields."""
    return [
        variable
        for variable in container.get("env", [])
        if not variable["name"].startswith(_OWN)
        and not {"fieldRef", "resourceFieldRef"} & variable.get("valueFrom", {}).keys()
    ]


def _files(pod: Mapping[str, Any]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the volumes of Secrets and ConfigMaps that the step reads, and its mounts of them."""
    volumes = [each for each in pod["spec"].get("volumes", []) if {"secret", "configMap"} & each.keys()]
    mounts = [
        mount
        for mount in step_container(pod).get("volumeMounts", [])
        if mount["name"] in {volume["name"] for volume in volumes}
    ]
    return [each for each in volumes if each["name"] in {mount["name"] for mount in mounts}], mounts


def _pod_spec(
    pod: Mapping[str, Any], settings: PodsConfig, volumes: list[dict[str, Any]], mounts: list[dict[str, Any]]
) -> dict[str, Any]:
    own = pod["spec"]
    tolerations = settings.tolerations
    if tolerations is None:
        # Those that Kubernetes adds to every pod are left to it.
        tolerations = [
            each
            for each in own.get("tolerations", [])
            if not str(each.get("key", "")).startswith("node.kubernetes.io/")
        ]
    selector = own.get("nodeSelector") if settings.node_selector is None else settings.node_selector
    shared_memory = {"medium": "Memory", "sizeLimit": settings.shared_memory}
    spec = {
        "serviceAccountName": own.get("serviceAccountName"),
        "imagePullSecrets": own.get("imagePullSecrets"),
        "nodeSelector": selector,
        "tolerations": tolerations,
        "affinity": own.get("affinity") if settings.node_selector is None else None,
        "volumes": [
            {"name": _SHARED_MEMORY, "emptyDir": shared_memory},
            {"name": _SCRATCH, "emptyDir": {}},
            *volumes,
        ],
        "containers": [
            {
                "name": NODE,
                "volumeMounts": [
                    {"name": _SHARED_MEMORY, "mountPath": "/dev/shm"},  # noqa: S108 - a mount point in the container
                    {"name": _SCRATCH, "mountPath": "/tmp"},  # noqa: S108 - likewise
                    *mounts,
                ],
            }
        ],
    }
    return {name: value for name, value in spec.items() if value}
