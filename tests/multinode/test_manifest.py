"""The TrainJob's manifest: valid for each version of Kubeflow Trainer, and what a step's own pod is."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from skd_lib.config import DistillConfig, MultinodeConfig, TeacherSftConfig, parse_section
from skd_lib.errors import SkdErrors
from skd_lib.multinode.manifest import RUN_LABEL, job_name, run_label, train_job
from skd_lib.steps.environment import ROOT
from tests.multinode.fake_kubernetes import STEP_POD

HERE = Path(__file__).parent


def schema(version: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((HERE / f"trainjob-{version}.json").read_text())
    return content


def make(pod: dict[str, Any] = STEP_POD, **settings: Any) -> dict[str, Any]:
    return train_job(
        "skd-distill-0", MultinodeConfig(**{"nodes": 2, **settings}), pod, run_id="run", arguments=["gs://b/x"]
    )


def pod_of(job: dict[str, Any]) -> dict[str, Any]:
    if "podTemplateOverrides" in job["spec"]:
        (override,) = job["spec"]["podTemplateOverrides"]
        assert override["targetJobs"] == [{"name": "node"}]
        return {name: override[name] for name in ("metadata", "spec")}
    (patch,) = job["spec"]["runtimePatches"]
    (replicated,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    assert replicated["name"] == "node"
    found: dict[str, Any] = replicated["template"]["spec"]["template"]
    return found


@pytest.mark.parametrize("version", ["2.1", "2.2"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {
            "nodes": 4,
            "processes_per_node": 8,
            "resources": {"cpu": "8", "memory": "64Gi", "nvidia.com/gpu": "8"},
            "node_selector": {"pool": "h100"},
            "tolerations": [{"key": "gpu", "operator": "Exists"}],
            "labels": {"kueue.x-k8s.io/queue-name": "gpus"},
            "timeout_hours": 12.0,
            "runtime_kind": "TrainingRuntime",
        },
    ],
)
def test_valid_for_trainer(version: str, settings: dict[str, Any]) -> None:
    job = make(**settings, trainer_version=version)
    jsonschema.validate(job, schema(version))
    other = {"2.1": "2.2", "2.2": "2.1"}[version]
    with pytest.raises(jsonschema.ValidationError, match="Additional properties are not allowed"):
        jsonschema.validate(job, schema(other))  # so unknown fields are found


def test_a_node_is_what_the_steps_pod_is() -> None:
    job = make()
    trainer = job["spec"]["trainer"]
    assert trainer["image"] == STEP_POD["spec"]["containers"][1]["image"]
    assert trainer["command"] == ["python3", "-m", "skd_lib.multinode.node"]
    assert trainer["args"] == ["gs://b/x"]
    assert (trainer["numNodes"], trainer["numProcPerNode"]) == (2, 2)
    # By reference; what is about the step's own pod stays out.
    assert trainer["env"] == [
        {
            "name": "SKD_TRACKING_URI",
            "valueFrom": {"configMapKeyRef": {"name": "skd-settings", "key": "mlflow-tracking-uri"}},
        },
        {"name": "SKD_LOG_LEVEL", "value": "INFO"},
        {"name": "KFP_RUN_ID", "value": "run"},
    ]
    assert trainer["resourcesPerNode"] == {
        "limits": {"memory": "64Gi", "nvidia.com/gpu": "2"},
        "requests": {"cpu": "8", "memory": "64Gi", "nvidia.com/gpu": "2"},
    }
    pod = pod_of(job)
    assert pod["metadata"]["labels"] == {"sidecar.istio.io/inject": "false"}
    assert pod["spec"]["serviceAccountName"] == "pipeline-runner"
    assert pod["spec"]["nodeSelector"] == STEP_POD["spec"]["nodeSelector"]
    assert pod["spec"]["tolerations"] == STEP_POD["spec"]["tolerations"][:1]
    (memory, _, secret), (container,) = pod["spec"]["volumes"], pod["spec"]["containers"]
    assert memory["emptyDir"] == {"medium": "Memory", "sizeLimit": "8Gi"}
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    assert (container["name"], mounts["/dev/shm"]) == ("node", memory["name"])  # noqa: S108
    # Of the step's volumes, the Secrets that it reads.
    assert secret == {"name": "skd-mlflow", "secret": {"secretName": "skd-mlflow", "optional": True}}
    assert mounts[str(ROOT / "skd-mlflow")] == "skd-mlflow"
    assert len(mounts) == 3
    assert "env" not in container  # Trainer refuses it there


def test_what_the_config_says_goes_first() -> None:
    job = make(
        resources={"cpu": "4", "memory": "8Gi", "nvidia.com/gpu": "8"},
        node_selector={},
        tolerations=[],
        timeout_hours=2,
    )
    trainer = job["spec"]["trainer"]
    assert trainer["resourcesPerNode"]["limits"] == {"memory": "8Gi", "nvidia.com/gpu": "8"}
    assert trainer["numProcPerNode"] == 8
    assert job["spec"]["activeDeadlineSeconds"] == 7200
    assert not {"nodeSelector", "tolerations"} & pod_of(job)["spec"].keys()
    bare = copy.deepcopy(STEP_POD)
    bare["spec"] = {"containers": [{"name": "main", "image": "i"}]}
    trainer = make(bare, trainer_version="2.1")["spec"]["trainer"]
    assert trainer["numProcPerNode"] == 1
    assert "resourcesPerNode" not in trainer


@given(st.text(), st.sampled_from(["distill", "teacher_sft"]), st.dictionaries(st.text(), st.text()))
def test_names_fit_kubernetes_and_differ_with_the_work(run_id: str, step: str, work: dict[str, str]) -> None:
    name = job_name(step, run_id, work)
    assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name)
    assert len(f"{name}-node-0-999-abcde") <= 63
    assert name == job_name(step, run_id, dict(reversed(work.items())))
    assert len({name, job_name(step, f"{run_id}'", work), job_name(step, run_id, [work])}) == 3


@given(st.text() | st.uuids().map(str), st.text())
def test_a_run_is_a_label_that_kubernetes_takes(run_id: str, other: str) -> None:
    label = run_label(run_id)
    assert re.fullmatch(r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?", label)
    assert (label == run_label(other)) == (run_id == other)


def test_a_job_is_found_by_its_run() -> None:
    labels = make(labels={"team": "nlp", RUN_LABEL: "another"})["metadata"]["labels"]
    assert labels == {"app.kubernetes.io/part-of": "skd", "team": "nlp", RUN_LABEL: "run"}
    run_id = "0c8a4a1e-5d0b-4f3e-9f0c-2f4a5e6b7c8d"
    assert run_label(run_id) == run_id


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        (DistillConfig, {"multinode": {"nodes": 3}}, "batch_size 8 cannot be shared by 3 processes"),
        (TeacherSftConfig, {"multinode": {"nodes": 2, "resources": {"nvidia.com/gpu": "8"}}}, "by 16 processes"),
        (
            DistillConfig,
            {"multinode": {"nodes": 2}, "method": "seqkd", "teacher_signal": {"mode": "stored"}},
            "stored teacher signal is in one machine's files",
        ),
        (DistillConfig, {"multinode": {"nodes": 1}}, "greater than or equal to 2"),
        (DistillConfig, {"multinode": {"nodes": 2, "resources": {"nvidia.com/gpu": "2.5"}}}, "must be a whole number"),
    ],
)
def test_what_cannot_work_is_refused_at_once(section: Any, values: dict[str, Any], message: str) -> None:
    with pytest.raises(SkdErrors, match=message):
        parse_section(section, values, where="config")
