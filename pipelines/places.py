"""Secrets and settings of the namespace that steps get. None has to exist; no value is in a pipeline."""

from __future__ import annotations

from typing import Any

from kfp import dsl, kubernetes

from skd_lib.steps.finish import UI_VARIABLE
from skd_lib.steps.mounted import ROOT, SECRETS
from skd_lib.steps.options import CHECKPOINT_ROOT_VARIABLE, EXPERIMENT_VARIABLE, TRACKING_URI_VARIABLE
from skd_lib.tracking.buffer import FOLDER_VARIABLE

CONFIG_MAP = "skd-settings"
"""The ConfigMap of a namespace in which its administrators say what holds for its runs; it need not exist."""
SETTINGS = {
    "mlflow-tracking-uri": TRACKING_URI_VARIABLE,
    "mlflow-experiment": EXPERIMENT_VARIABLE,
    "checkpoint-root": CHECKPOINT_ROOT_VARIABLE,
    "tracking-buffer": FOLDER_VARIABLE,
    "kubeflow-page": UI_VARIABLE,
}
"""Environment variable by key of that ConfigMap.

Places are no parameters of steps: they would be part of the cache's key, and another place would train again.
"""
_UNTRACKED = ("comet_score", "comet_score-off", "show-data", "show-teacher", "show-trial", "compare_variant")
_TRAINING = ("preflight", "teacher_sft", "student_init", "distill")


def needs_secret(name: str, secret: str) -> bool:
    """Whether a step needs a Secret."""
    match secret:
        case "skd-hub":
            return name in ("preflight", "import_model", "prepare_data", "student_init", "comet_score")
        case "skd-judge":
            return name.startswith("evaluate")
        case "skd-notify":
            return name == "finish"
        case _:
            return name not in _UNTRACKED


def needs_setting(name: str, variable: str) -> bool:
    """Whether a step needs a setting: each takes room in Kubeflow's records of the run."""
    match variable:
        case _ if name in _UNTRACKED:
            return False
        case "SKD_CHECKPOINT_ROOT":
            return name in _TRAINING
        case "SKD_EXPERIMENT":  # later steps find the run where preflight has made it
            return name in ("preflight", "finish")
        case "KF_PIPELINES_UI_ENDPOINT":
            return name == "finish"
        case _:
            return True


def give_places(task: dsl.PipelineTask, name: str, settings: Any) -> None:
    """Give a task the Secrets, as files, and the settings, as variables, that it needs.

    Args:
        task: The task.
        name: Its name.
        settings: Pipeline parameter: name of the ConfigMap.
    """
    for secret in SECRETS:
        if needs_secret(name, secret):
            kubernetes.use_secret_as_volume(task, secret, str(ROOT / secret), optional=True)
    keys = {key: variable for key, variable in SETTINGS.items() if needs_setting(name, variable)}
    if keys:
        kubernetes.use_config_map_as_env(task, settings, keys, optional=True)
