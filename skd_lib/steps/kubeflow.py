"""Kubeflow Pipelines' API, asked by the run's last step: whether a person stopped the run, and which task failed.

It may well be out of reach: nothing depends on an answer. Up to KFP 2.17 (`run_details.task_details`) each node of
Argo's workflow is a task: one a step, one a driver, one a nested DAG, and `NAME.onExit`, whose presence says that
`NAME`, which holds all steps, has ended as its state says. Without MLMD (`tasks`, given on demand) a task has a type,
and a message if it failed.
"""

from __future__ import annotations

import logging
import os
import pkgutil
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import requests

from skd_lib import steps
from skd_lib._core.machine import POD_VARIABLE
from skd_lib.tracking.ending import CANCELLED, FAILED, OWN_STEP, SUCCEEDED, Seen

log = logging.getLogger(__name__)
HOST_VARIABLE = "KF_PIPELINES_ENDPOINT"
"""Address of the API, as the `kfp` package reads it."""
TOKEN_VARIABLE = "KF_PIPELINES_SA_TOKEN_PATH"  # noqa: S105 - a path
_TOKEN_FILE = "/var/run/secrets/kubeflow/pipelines/token"  # noqa: S105
"""File in which Kubeflow's profiles mount a token for the API."""
_IN_CLUSTER = ("KUBERNETES_SERVICE_HOST", POD_VARIABLE)
_TIMEOUT_SECONDS = (3.0, 10.0)
_DRIVER, _ON_EXIT = "-driver", ".onExit"


def ask(run_id: str) -> Seen:
    """Ask the API for a run; nothing is known without an answer.

    `KF_PIPELINES_ENDPOINT` is the API's address, see `address`; `KF_PIPELINES_SA_TOKEN_PATH` names a file with a token
    for it; unset: where Kubeflow mounts one, if it does.
    """
    host = address(_launcher())
    if not (run_id and host):
        return Seen()
    try:
        token = Path(os.environ.get(TOKEN_VARIABLE) or _TOKEN_FILE).read_text(encoding="utf-8").strip()
    except OSError:
        token = ""
    headers = {"Authorization": f"Bearer {token}"} if token else {}

    def get(view: str = "") -> Any:
        url = f"{host}/apis/v2beta1/runs/{run_id}{view}"
        answer = requests.get(url, headers=headers, timeout=_TIMEOUT_SECONDS, allow_redirects=False)
        answer.raise_for_status()
        return answer.json()

    try:
        run = get()
        return read_run(get("?view=FULL") if run.get("task_count") else run)
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:  # requests' errors are the first two
        log.info("Kubeflow's API does not tell how the run ended: %s", type(error).__name__)
        return Seen()


def read_run(run: Mapping[str, Any]) -> Seen:
    """Read the API's record of a run; raise AttributeError, KeyError, TypeError or ValueError if it is none."""
    if not run["run_id"]:
        raise ValueError("no run")
    states = {run.get("state"), *(entry.get("state") for entry in run.get("state_history") or [])}
    listed = run.get("tasks") or (run.get("run_details") or {}).get("task_details") or []
    tasks = [_read_task(entry) for entry in sorted(listed, key=lambda entry: str(entry.get("end_time")))]
    handlers = {task.name.removesuffix(_ON_EXIT) for task in tasks if task.name.endswith(_ON_EXIT)}
    ends = {task.state for task in tasks if task.kind == "EXIT_HANDLER" or task.name in handlers}
    failed = [task for task in tasks if task.state == FAILED and _is_step(task.name)]
    return Seen(
        known=True,
        cancelled=bool(states & CANCELLED),
        steps=next((end for end in (FAILED, SUCCEEDED) if end in ends), ""),
        failed=list(dict.fromkeys(task.name for task in failed)),
        told=next((f"{task.name}: {task.message}" for task in failed if task.message), ""),
    )


class _Task(NamedTuple):
    """A task as the API lists it; `kind` and `message` without MLMD only."""

    name: str
    state: str
    kind: str
    message: str


def _read_task(entry: Mapping[str, Any]) -> _Task:
    state = str(entry.get("state"))
    return _Task(
        name=str(entry.get("display_name") or entry.get("name")),
        state=SUCCEEDED if state == "CACHED" else state,
        kind=str(entry.get("type") or ""),
        message=str((entry.get("status_metadata") or {}).get("message") or ""),
    )


def _is_step(task: str) -> bool:
    """Tell whether a task is one of our steps, maybe with a role (`evaluate-teacher`), or a driver."""
    names = [module.name.replace("_", "-") for module in pkgutil.iter_modules(steps.__path__)]
    named_so = task.endswith(_DRIVER) or any(task == name or task.startswith(f"{name}-") for name in names)
    return named_so and not task.startswith(OWN_STEP)


def address(launcher: Sequence[str]) -> str:
    """Return the API's address: that of the environment, or in a cluster that of KFP's launcher.

    From KFP 2.16 on the driver names the API in the command line of the launcher.
    """
    if host := os.environ.get(HOST_VARIABLE):
        return host.rstrip("/")
    if service := os.environ.get("ML_PIPELINE_SERVICE_HOST"):  # in the API's own namespace
        return f"http://{service}:{os.environ.get('ML_PIPELINE_SERVICE_PORT') or 8888}"
    if not any(map(os.environ.get, _IN_CLUSTER)):
        return ""
    options = dict(pairwise(part for word in launcher for part in word.split("=", 1)))
    server = options.get("--ml_pipeline_server_address")
    scheme = "https" if options.get("--ml_pipeline_tls_enabled") == "true" else "http"
    return f"{scheme}://{server}:8888" if server else "http://ml-pipeline.kubeflow:8888"


def _launcher() -> list[str]:
    """Return the command line of KFP's launcher, which has started this process."""
    try:
        return Path(f"/proc/{os.getppid()}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return []
