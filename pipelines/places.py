"""Secrets and settings of the namespace that steps get, as files. None has to exist; no value is in a pipeline."""

from __future__ import annotations

from typing import Any

from kfp import dsl, kubernetes

from skd_lib.steps.mounted import ROOT, SECRETS, SETTINGS_FOLDER

CONFIG_MAP = "skd-settings"
"""The ConfigMap of a namespace in which its administrators say what holds for its runs; it need not exist."""
_UNTRACKED = ("show-data", "show-trial", "compare_variant")


def needs_secret(name: str, secret: str) -> bool:
    """Whether a step needs a Secret: each takes room in Kubeflow's records of the run."""
    match secret:
        case "skd-hub":
            return name in (
                "preflight",
                "prepare_data",
                "teacher_sft",
                "evaluate_teacher",
                "student_init",
                "comet_score",
            )
        case "skd-judge":
            return name == "preflight" or name.startswith("evaluate")
        case "skd-notify":
            return name == "finish"
        case _:
            return name not in _UNTRACKED


def give_places(task: dsl.PipelineTask, name: str, settings: Any) -> None:
    """Mount the Secrets and the settings that a task needs.

    Args:
        task: The task.
        name: Its name.
        settings: Pipeline parameter: name of the ConfigMap. Places are no parameters of steps: they would be part of
            the cache's key, and another place would train again.
    """
    for secret in SECRETS:
        if needs_secret(name, secret):
            kubernetes.use_secret_as_volume(task, secret, str(ROOT / secret), optional=True)
    if name not in _UNTRACKED:
        kubernetes.use_config_map_as_volume(task, settings, str(ROOT / SETTINGS_FOLDER), optional=True)
