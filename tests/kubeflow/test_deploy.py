"""The manifests and workflows: checked by Kubernetes' own models, and by the rules that they claim to keep."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import kubernetes.client
import pytest
import yaml

ROOT = Path(__file__).parents[2]
BASE = ROOT / "pipelines/deploy/base"
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
MODELS = {
    "ServiceAccount": "V1ServiceAccount",
    "Role": "V1Role",
    "RoleBinding": "V1RoleBinding",
    "PersistentVolumeClaim": "V1PersistentVolumeClaim",
    "CronJob": "V1CronJob",
    "NetworkPolicy": "V1NetworkPolicy",
}
# https://kubernetes.io/docs/concepts/security/pod-security-standards/#restricted
VOLUMES = {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret"}


def manifests() -> list[dict[str, Any]]:
    kustomization = yaml.safe_load((BASE / "kustomization.yaml").read_text(encoding="utf-8"))
    assert {path.name for path in BASE.glob("*.yaml")} == {"kustomization.yaml", *kustomization["resources"]}
    return [
        document
        for name in kustomization["resources"]
        for document in yaml.safe_load_all((BASE / name).read_text(encoding="utf-8"))
    ]


@pytest.mark.parametrize("manifest", manifests(), ids=lambda manifest: f"{manifest['kind']}")
def test_every_field_is_one_of_kubernetes(manifest: dict[str, Any]):
    api = kubernetes.client.ApiClient()
    model = api.deserialize(SimpleNamespace(data=json.dumps(manifest)), MODELS[manifest["kind"]])
    assert api.sanitize_for_serialization(model) == manifest  # an unknown field would be lost on the way


def test_the_trigger_keeps_to_the_restricted_standard():
    (job,) = (each for each in manifests() if each["kind"] == "CronJob")
    pod = job["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] > 0
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys()
    for container in pod["containers"]:
        context = container["securityContext"]
        assert context["allowPrivilegeEscalation"] is False
        assert context["capabilities"] == {"drop": ["ALL"]}
        assert "privileged" not in context
        assert container["resources"]["limits"]["memory"]
    assert all(volume.keys() - {"name"} <= VOLUMES for volume in pod["volumes"])


def test_the_triggers_options_exist():
    from typer.main import get_command

    from skd_lib.cli import app

    (job,) = (each for each in manifests() if each["kind"] == "CronJob")
    (container,) = job["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"]
    command = get_command(app).commands["trigger"]  # type: ignore[attr-defined]
    known = {option for parameter in command.params for option in parameter.opts}
    assert {argument for argument in container["args"] if argument.startswith("--")} <= known


PUBLISHES = {"images": [("contents", "write"), ("packages", "write"), ("pull-requests", "write")]}
"""What else workflows need that push images and propose their digests."""


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_pin_their_actions_and_ask_for_little(path: Path):
    workflow = yaml.safe_load(path.read_text(encoding="utf-8"))
    granted = [workflow["permissions"], *(job.get("permissions", {}) for job in workflow["jobs"].values())]
    allowed = {("contents", "read"), ("id-token", "write"), *PUBLISHES.get(path.stem, ())}
    for permissions in granted:
        assert set(permissions.items()) <= allowed
    for job in workflow["jobs"].values():
        assert job["timeout-minutes"]
        for step in job["steps"]:
            assert re.fullmatch(r"[\w./-]+@[0-9a-f]{40}", step.get("uses", "a/b@" + "0" * 40)), step
            assert "${{" not in step.get("run", ""), "values go through the environment, not into the script"
