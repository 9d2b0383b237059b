"""Secrets of the namespace that steps get as environment variables. None has to exist; no value is in a pipeline."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from kfp import dsl, kubernetes


@dataclass(frozen=True)
class Secret:
    """A Kubernetes Secret.

    Attributes:
        name: Its name.
        keys: Environment variable by key.
        needed: Whether a task needs it: its name and itself are given.
    """

    name: str
    keys: Mapping[str, str]
    needed: Callable[[str, dsl.PipelineTask], bool]


SECRETS = (
    Secret(
        "skd-hub",
        {"token": "HF_TOKEN"},
        lambda name, _: name in ("preflight", "import_model", "prepare_data", "student_init", "comet_score"),
    ),
    Secret(
        "skd-mlflow",
        {
            "username": "MLFLOW_TRACKING_USERNAME",
            "password": "MLFLOW_TRACKING_PASSWORD",
            "token": "MLFLOW_TRACKING_TOKEN",
        },
        lambda _, task: "tracking_uri" in task.inputs,
    ),
    # Storage that pods cannot reach by their service account: fsspec's packages read these.
    Secret(
        "skd-storage",
        {
            "aws-access-key-id": "AWS_ACCESS_KEY_ID",
            "aws-secret-access-key": "AWS_SECRET_ACCESS_KEY",
            "aws-endpoint-url": "AWS_ENDPOINT_URL",
            "azure-account": "AZURE_STORAGE_ACCOUNT_NAME",
            "azure-key": "AZURE_STORAGE_ACCOUNT_KEY",
        },
        lambda _, task: "tracking_uri" in task.inputs,
    ),
    Secret("skd-judge", {"api-key": "SKD_JUDGE_API_KEY"}, lambda name, _: name.startswith("evaluate")),
    Secret("skd-notify", {"webhook-url": "SKD_NOTIFY_WEBHOOK"}, lambda name, _: name == "finish"),
)


def give_secrets(task: dsl.PipelineTask, name: str) -> None:
    """Give a task the secrets that it needs."""
    for secret in SECRETS:
        if secret.needed(name, task):
            kubernetes.use_secret_as_env(task, secret.name, dict(secret.keys), optional=True)
