"""What Kubeflow Pipelines' API says of a run that is ending: whether a person stopped it, and which task failed.

It is asked by the run's last step, in the cluster, and may well be out of reach: nothing depends on an answer. In this
version's record (KFP 2.15 to 2.17) each node of Argo's workflow is a task: one a step, one a driver, one a nested DAG,
and `NAME.onExit`, whose presence says that `NAME`, which holds all steps, has ended as its state says.
"""

from __future__ import annotations

import logging
import os
import pkgutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import requests

from skd_lib.tracking.ending import CANCELLED, FAILED, OWN_STEP, SUCCEEDED, Seen

log = logging.getLogger(__name__)
HOST_VARIABLE = "KF_PIPELINES_ENDPOINT"
"""Address of the API, as the `kfp` package reads it."""
TOKEN_VARIABLE = "KF_PIPELINES_SA_TOKEN_PATH"  # noqa: S105 - a path
_TOKEN_FILE = "/var/run/secrets/kubeflow/pipelines/token"  # noqa: S105
"""Where Kubeflow's profiles mount a token for the API."""
_TIMEOUT_SECONDS = (3.0, 10.0)
"""To connect, and for an answer."""
_DRIVER, _ON_EXIT = "-driver", ".onExit"


def ask(run_id: str) -> Seen:
    """Ask the API for a run; nothing is known without an answer.

    Args:
        run_id: The pipeline run; empty: nothing is asked.

    Environment:
        KF_PIPELINES_ENDPOINT: the API's address; unset: that of the service `ml-pipeline`, in a cluster.
        KF_PIPELINES_SA_TOKEN_PATH: file with a token for it; unset: where Kubeflow mounts one, if it does.
    """
    host = _host()
    if not (run_id and host):
        return Seen()
    headers = {"Authorization": f"Bearer {token}"} if (token := _token()) else {}
    try:
        answer = requests.get(
            f"{host}/apis/v2beta1/runs/{run_id}", headers=headers, timeout=_TIMEOUT_SECONDS, allow_redirects=False
        )
        answer.raise_for_status()
        return read_run(answer.json())
    except (OSError, ValueError, TypeError, AttributeError) as error:  # requests' are the first two; another's answer
        log.info("Kubeflow's API does not tell how the run ended: %s", type(error).__name__)
        return Seen()


def read_run(run: Mapping[str, Any]) -> Seen:
    """Read the API's record of a run.

    Raises:
        AttributeError, TypeError, ValueError: it is no such record.
    """
    if not run["run_id"]:
        raise ValueError("no run")
    states = {run.get("state"), *(entry.get("state") for entry in run.get("state_history") or [])}
    tasks = (run.get("run_details") or {}).get("task_details") or []
    named = {str(task.get("display_name")): task for task in sorted(tasks, key=lambda task: str(task.get("end_time")))}
    ended = next((name.removesuffix(_ON_EXIT) for name in named if name.endswith(_ON_EXIT)), "")
    steps = named[ended].get("state") if ended in named else ""
    failed = [name for name, task in named.items() if task.get("state") == FAILED and _is_step(name)]
    return Seen(
        known=True,
        cancelled=bool(states & CANCELLED),
        steps=steps if steps in (SUCCEEDED, FAILED) else "",
        failed=failed,
    )


def _is_step(task: str) -> bool:
    """Whether a task is one of our steps, maybe with a role (`evaluate-teacher`), or a driver."""
    from skd_lib import steps

    if task.startswith(OWN_STEP):
        return False
    names = [module.name.replace("_", "-") for module in pkgutil.iter_modules(steps.__path__)]
    return task.endswith(_DRIVER) or any(task == name or task.startswith(f"{name}-") for name in names)


def _host() -> str:
    if host := os.environ.get(HOST_VARIABLE):
        return host.rstrip("/")
    if service := os.environ.get("ML_PIPELINE_SERVICE_HOST"):  # in the API's own namespace
        return f"http://{service}:{os.environ.get('ML_PIPELINE_SERVICE_PORT') or 8888}"
    return "http://ml-pipeline.kubeflow:8888" if os.environ.get("KUBERNETES_SERVICE_HOST") else ""


def _token() -> str:
    try:
        return Path(os.environ.get(TOKEN_VARIABLE) or _TOKEN_FILE).read_text(encoding="utf-8").strip()
    except OSError:
        return ""
