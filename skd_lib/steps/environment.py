"""The environment variables of a step, and the Secrets and settings that Kubernetes mounts as files for them.

As files Secrets take a fraction of the room that variables take in Kubeflow's records of a run, which hold each pod's
description up to six times (`skd_kfp.pipelines.kubeflow.sizes`).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

TRACKING_URI_VARIABLE = "SKD_TRACKING_URI"
EXPERIMENT_VARIABLE = "SKD_EXPERIMENT"
CHECKPOINT_ROOT_VARIABLE = "SKD_CHECKPOINT_ROOT"
RESULT_VARIABLE = "SKD_RESULT_URI"
"""Exchange folder in which another pod waits for this step's outputs (`skd_lib.multinode`)."""
ROOT = Path("/etc/skd")
"""Holds a folder for each Secret and one for the settings, with a file for each key."""
SETTINGS_FOLDER = "settings"
"""The folder of the ConfigMap that the pipeline's parameter `settings` names."""
SETTINGS: Mapping[str, str] = {
    "mlflow-tracking-uri": TRACKING_URI_VARIABLE,
    "mlflow-experiment": EXPERIMENT_VARIABLE,
    "checkpoint-root": CHECKPOINT_ROOT_VARIABLE,
    "tracking-buffer": "SKD_TRACKING_BUFFER",
    "kubeflow-page": "KF_PIPELINES_UI_ENDPOINT",
}
"""Environment variable by key of that ConfigMap."""
SECRETS: Mapping[str, Mapping[str, str]] = {
    "skd-hub": {"token": "HF_TOKEN"},
    # Not MLflow's own names, which Kubeflow's integration fills: see `tracking.client.use_credentials`.
    "skd-mlflow": {"username": "SKD_MLFLOW_USERNAME", "password": "SKD_MLFLOW_PASSWORD", "token": "SKD_MLFLOW_TOKEN"},
    # Storage that pods cannot reach by their service account: fsspec's packages read these.
    "skd-storage": {
        "aws-access-key-id": "AWS_ACCESS_KEY_ID",
        "aws-secret-access-key": "AWS_SECRET_ACCESS_KEY",
        "aws-endpoint-url": "AWS_ENDPOINT_URL",
        "azure-account": "AZURE_STORAGE_ACCOUNT_NAME",
        "azure-key": "AZURE_STORAGE_ACCOUNT_KEY",
    },
    "skd-judge": {"api-key": "SKD_JUDGE_API_KEY"},
    "skd-teacher": {"api-key": "SKD_TEACHER_API_KEY"},
    "skd-notify": {"webhook-url": "SKD_NOTIFY_WEBHOOK"},
}
"""Environment variable by Secret and key. None has to exist."""
VOLUMES = (
    *(*SECRETS, "scratch", "shared-memory"),
    *("kfp-launcher", "ca-bundle", "custom-ca", "gcs-scratch", "s3-scratch", "minio-scratch"),
    *("dot-local-scratch", "dot-cache-scratch", "dot-config-scratch"),
)
"""Names of a pod's volumes, ours and Kubeflow's. The ConfigMap's volume has its name: it must be another."""


def load_mounted(root: Path = ROOT) -> None:
    """Set the variables of all files that are mounted under `root`; variables that are set already stay."""
    for name, keys in {**SECRETS, SETTINGS_FOLDER: SETTINGS}.items():
        for key, variable in keys.items():
            file = root / name / key
            if file.is_file():
                os.environ.setdefault(variable, file.read_text(encoding="utf-8").rstrip("\r\n"))
