"""The manifests and workflows: checked by Kubernetes' own models, and by the rules that they claim to keep."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import kubernetes.client
import pytest
import yaml

from skd_kfp.pipelines.task_settings import CONFIG_MAP
from skd_lib.steps.environment import SECRETS, SETTINGS

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "pipelines/deploy"
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
MODELS = {
    "ConfigMap": "V1ConfigMap",
    "CronJob": "V1CronJob",
    "Namespace": "V1Namespace",
    "NetworkPolicy": "V1NetworkPolicy",
    "PersistentVolumeClaim": "V1PersistentVolumeClaim",
    "Role": "V1Role",
    "RoleBinding": "V1RoleBinding",
    "Secret": "V1Secret",
    "Service": "V1Service",
    "ServiceAccount": "V1ServiceAccount",
    "StatefulSet": "V1StatefulSet",
}
"""Of Kubernetes itself; Trainer's are checked in tests/multinode."""
# https://kubernetes.io/docs/concepts/security/pod-security-standards/#restricted
VOLUMES = {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret"}
KUBEFLOW = "kubeflow"
"""Where a single-user installation runs the pipelines' pods."""


def manifests(folder: str) -> list[dict[str, Any]]:
    """What `kubectl apply -k` gets of a folder, but for the labels that it adds."""
    place = DEPLOY / folder
    kustomization = yaml.safe_load((place / "kustomization.yaml").read_text(encoding="utf-8"))
    assert {path.name for path in place.glob("*.yaml")} == {"kustomization.yaml", *kustomization["resources"]}
    return [
        document
        for name in kustomization["resources"]
        for document in yaml.safe_load_all((place / name).read_text(encoding="utf-8"))
    ]


FOLDERS = sorted(path.parent.name for path in DEPLOY.glob("*/kustomization.yaml"))
ALL = [(folder, manifest) for folder in FOLDERS for manifest in manifests(folder)]
FIRST = manifests("first-cluster")


def only(kind: str, found: list[dict[str, Any]] = FIRST) -> dict[str, Any]:
    (manifest,) = (each for each in found if each["kind"] == kind)
    return manifest


def pods() -> list[tuple[str, dict[str, Any]]]:
    trigger = only("CronJob", manifests("base"))["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    return [("trigger", trigger), ("mlflow", only("StatefulSet")["spec"]["template"]["spec"])]


def containers(pod: dict[str, Any]) -> list[dict[str, Any]]:
    return [*pod.get("initContainers", []), *pod["containers"]]


@pytest.mark.parametrize(
    "manifest",
    [manifest for _, manifest in ALL if manifest["kind"] in MODELS],
    ids=lambda manifest: f"{manifest['kind']}-{manifest['metadata']['name']}",
)
def test_every_field_is_one_of_kubernetes(manifest: dict[str, Any]):
    api = kubernetes.client.ApiClient()
    model = api.deserialize(SimpleNamespace(data=json.dumps(manifest)), MODELS[manifest["kind"]])
    assert api.sanitize_for_serialization(model) == manifest  # an unknown field would be lost on the way


def test_nothing_is_left_out():
    assert FOLDERS == ["base", "engine", "first-cluster", "multinode"]
    assert {manifest["kind"] for _, manifest in ALL} == {*MODELS, "TrainingRuntime"}


@pytest.mark.parametrize(("_name", "pod"), pods(), ids=lambda value: value if isinstance(value, str) else "")
def test_pods_keep_to_the_restricted_standard(_name: str, pod: dict[str, Any]):
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] > 0
    assert pod["securityContext"]["fsGroup"] == pod["securityContext"]["runAsGroup"]  # else volumes are root's
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod["automountServiceAccountToken"] is False
    assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys()
    for container in containers(pod):
        context = container["securityContext"]
        assert context["allowPrivilegeEscalation"] is False
        assert context["readOnlyRootFilesystem"] is True
        assert context["capabilities"] == {"drop": ["ALL"]}
        assert "privileged" not in context
        assert container["resources"]["limits"]["memory"]
        assert "/tmp" in {mount["mountPath"] for mount in container["volumeMounts"]}  # noqa: S108
    assert all(volume.keys() - {"name"} <= VOLUMES for volume in pod["volumes"])


def test_the_first_cluster_names_its_namespaces():
    """One command applies it, whatever namespace is the current one."""
    made = {each["metadata"]["name"] for each in FIRST if each["kind"] == "Namespace"}
    used = {each["metadata"]["namespace"] for each in FIRST if each["kind"] != "Namespace"}
    assert used == made | {KUBEFLOW}
    assert only("Namespace")["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"


def test_mlflow_is_where_the_steps_look_for_it():
    settings = only("ConfigMap")
    assert (settings["metadata"]["name"], settings["metadata"]["namespace"]) == (CONFIG_MAP, KUBEFLOW)
    assert settings["data"].keys() == SETTINGS.keys()
    service, workload = only("Service"), only("StatefulSet")
    host = f"{service['metadata']['name']}.{service['metadata']['namespace']}"
    (port,) = service["spec"]["ports"]
    assert settings["data"]["mlflow-tracking-uri"] == f"http://{host}:{port['port']}"
    template = workload["spec"]["template"]
    (mlflow,) = template["spec"]["containers"]
    assert service["spec"]["selector"].items() <= template["metadata"]["labels"].items()
    assert workload["spec"]["selector"]["matchLabels"].items() <= template["metadata"]["labels"].items()
    assert mlflow["ports"] == [{"name": port["targetPort"], "containerPort": 5000}]
    assert "--port=5000" in mlflow["args"]
    assert "--host=0.0.0.0" in mlflow["args"]
    # MLflow refuses other names in the header `Host` (against DNS rebinding).
    (allowed,) = (argument.partition("=")[2] for argument in mlflow["args"] if argument.startswith("--allowed-hosts="))
    assert {f"{host}:{port['port']}", "localhost:*"} <= set(allowed.split(","))
    assert "*" not in allowed.split(",")
    assert {name: mlflow[name]["httpGet"] for name in mlflow if name.endswith("Probe")} == {
        name: {"path": "/health", "port": "http"} for name in ("startupProbe", "readinessProbe", "livenessProbe")
    }


def test_mlflows_database_is_on_a_volume_and_out_of_reach():
    workload = only("StatefulSet")
    pod = workload["spec"]["template"]["spec"]
    assert workload["spec"]["replicas"] == 1
    assert pod["serviceAccountName"] == only("ServiceAccount")["metadata"]["name"]
    (claim,) = workload["spec"]["volumeClaimTemplates"]
    volumes = {claim["metadata"]["name"], *(volume["name"] for volume in pod["volumes"])}
    assert volumes == {mount["name"] for container in containers(pod) for mount in container["volumeMounts"]}
    (database,), (mlflow,) = pod["initContainers"], pod["containers"]
    assert database["restartPolicy"] == "Always"  # else MLflow would wait for its end
    assert database["startupProbe"]
    assert database["livenessProbe"]
    assert database["args"] == ["-c", "listen_addresses="]  # no network: no password is needed
    environment = {each["name"]: each["value"] for container in containers(pod) for each in container["env"]}
    mounts = [{each["name"]: each for each in container["volumeMounts"]} for container in (database, mlflow)]
    uri = urlsplit(environment["MLFLOW_BACKEND_STORE_URI"])
    assert (uri.username, uri.path) == (environment["POSTGRES_USER"], f"/{environment['POSTGRES_DB']}")
    assert uri.query == f"host={mounts[0]['socket']['mountPath']}" == f"host={mounts[1]['socket']['mountPath']}"
    assert environment["PGDATA"].startswith(f"{mounts[0]['data']['mountPath']}/")
    assert mounts[0]["data"]["subPath"] != mounts[1]["data"]["subPath"]
    (artifacts,) = (each.partition("=")[2] for each in mlflow["args"] if each.startswith("--artifacts-destination="))
    assert artifacts.startswith(f"{mounts[1]['data']['mountPath']}/")


def test_the_steps_and_the_trigger_alone_reach_mlflow():
    policy = only("NetworkPolicy")["spec"]
    assert (policy["podSelector"], policy["policyTypes"], policy["egress"]) == ({}, ["Ingress", "Egress"], [])
    (rule,) = policy["ingress"]
    steps, trigger = rule["from"]
    assert steps == {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": KUBEFLOW}}}
    kustomization = yaml.safe_load((DEPLOY / "base/kustomization.yaml").read_text(encoding="utf-8"))
    assert trigger["podSelector"]["matchLabels"].items() <= kustomization["labels"][0]["pairs"].items()
    assert rule["ports"] == [{"protocol": "TCP", "port": "http"}]
    # And the trigger may go there.
    service = only("Service")
    namespace = {"matchLabels": {"kubernetes.io/metadata.name": service["metadata"]["namespace"]}}
    port = {"protocol": "TCP", "port": service["spec"]["ports"][0]["port"]}
    rules = only("NetworkPolicy", manifests("base"))["spec"]["egress"]
    assert {"to": [{"namespaceSelector": namespace}], "ports": [port]} in rules


def test_secrets_are_those_of_the_steps_and_empty():
    found = {each["metadata"]["name"]: each for each in FIRST if each["kind"] == "Secret"}
    assert found.keys() == SECRETS.keys()
    texts = (DEPLOY / "first-cluster/secrets.yaml").read_text(encoding="utf-8").split("\n---\n")
    for (name, keys), text in zip(SECRETS.items(), texts, strict=True):
        assert found[name].keys() == {"apiVersion", "kind", "metadata"}  # so that applying it empties none
        assert found[name]["metadata"]["namespace"] == KUBEFLOW
        assert all(key in text for key in keys)


def test_no_manifest_holds_a_secret():
    for folder, manifest in ALL:
        text = json.dumps(manifest)
        assert not re.search(r"://[^/@\s]*:[^/@\s]*@", text), folder
        assert not re.search(r'"name": "\w*(PASSWORD|TOKEN|SECRET|KEY)\w*", "value"', text), folder


def test_the_triggers_options_exist():
    from typer.main import get_command

    from skd_kfp.pipelines.cli import app

    (container,) = only("CronJob", manifests("base"))["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"]
    command = get_command(app).commands["trigger"]  # type: ignore[attr-defined]
    known = {option for parameter in command.params for option in parameter.opts}
    assert {argument for argument in container["args"] if argument.startswith("--")} <= known


PUBLISHES = {
    "publish-images": [("packages", "write")],
    "release": [("attestations", "write"), ("contents", "write"), ("packages", "read"), ("packages", "write")],
}
"""What else workflows need that push images and publish a release."""


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_pin_their_actions_and_ask_for_little(path: Path):
    workflow = yaml.safe_load(path.read_text(encoding="utf-8"))
    granted = [workflow["permissions"], *(job.get("permissions", {}) for job in workflow["jobs"].values())]
    allowed = {("contents", "read"), ("id-token", "write"), *PUBLISHES.get(path.stem, ())}
    for permissions in granted:
        assert set(permissions.items()) <= allowed
    for job in workflow["jobs"].values():
        if "uses" in job:
            assert job["uses"].startswith("./.github/workflows/")
            continue
        assert job["timeout-minutes"]
        for step in job["steps"]:
            assert re.fullmatch(r"[\w./-]+@[0-9a-f]{40}", step.get("uses", "a/b@" + "0" * 40)), step
            assert "${{" not in step.get("run", ""), "values go through the environment, not into the script"
