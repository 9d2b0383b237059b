"""The MLflow runs of a step: found by their tags, adopted from Kubeflow, or created.

Functions raise `MlflowException` where the store does not answer, `Deleted` where the experiment was deleted.
"""

from __future__ import annotations

import itertools
import logging
import os
import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from skd_lib import __version__
from skd_lib.tracking.client import check_not_deleted, find_experiment, find_or_create_experiment

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

log = logging.getLogger(__name__)

PIPELINE_RUN_TAG = "kfp.pipeline_run_id"
TASK_TAG = "kfp.task"
PARENT_TAG = "mlflow.parentRunId"
ERROR_TAG = "skd.error"
ATTEMPT_TAG = "skd.attempt"
"""When the latest attempt at the step began, in milliseconds: what an earlier one left behind must not undo it."""
IMAGE_TAG = "skd.image"
IMAGE_VARIABLE = "SKD_IMAGE"
"""Environment variable with the image that a step runs in; the compiled pipeline sets it."""
SETTLE_SECONDS = 1.0
"""Age at which a new parent run counts as the only one."""
PAGE_ROWS = 1000
"""Rows of one answer: MLflow's own limit for experiments."""


def now() -> int:
    """Return the time in MLflow's milliseconds."""
    return int(time.time() * 1000)


class RunLocation(BaseModel):
    """The place in MLflow that one attempt at a step, begun at `started`, logs to.

    Experiment and run name are for a parent run, where there is none yet. `mlflow_run_id` is the run that Kubeflow made
    for this step; empty: none.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    tracking_uri: str
    experiment: str
    pipeline_run_id: str
    step: str
    run_name: str | None = None
    mlflow_run_id: str = ""
    started: int = Field(default_factory=now)


class Record(BaseModel):
    """A value that a step's run or its parent run is to hold: it can wait on disk, and be sent twice without effect."""

    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="constants")

    which: Literal["step", "parent"] = "step"
    at: int = Field(default_factory=now)


def locate(client: MlflowClient, location: RunLocation, *, reopen: bool) -> dict[str, Run]:
    """Return the runs `step` and `parent`, created if need be.

    With `reopen` the step is running: its runs are marked so, and the attempt as the latest, with no error yet.
    """
    from mlflow.entities import RunTag

    adopted = _adopted_run(client, location)
    if adopted is None:
        runs = _find_or_create(client, location)
    else:
        runs = {"step": adopted, "parent": _root_of(client, adopted)}
        if TASK_TAG not in adopted.data.tags:
            tags = {**_source_tags(location.step), TASK_TAG: location.step}
            client.log_batch(adopted.info.run_id, tags=[RunTag(name, value) for name, value in tags.items()])
    if reopen:
        for run in runs.values():
            if run.info.status != "RUNNING":
                client.update_run(run.info.run_id, status="RUNNING")
        step = runs["step"]
        if step.data.tags.get(ATTEMPT_TAG) != str(location.started):
            client.set_tag(step.info.run_id, ATTEMPT_TAG, str(location.started))
            if ERROR_TAG in step.data.tags:
                client.delete_tag(step.info.run_id, ERROR_TAG)  # of an attempt before this one
    return runs


def find_parent(client: MlflowClient, location: RunLocation) -> Run | None:
    """Return the parent run of the pipeline run, in whatever experiment it is; None if there is none."""
    adopted = _adopted_run(client, location)
    if adopted is not None and PARENT_TAG in adopted.data.tags:
        return _root_of(client, adopted)
    named, wanted = find_experiment(client, location.experiment), _of_pipeline(location)
    first = [named.experiment_id] if named is not None and named.lifecycle_stage != "deleted" else []
    for found in itertools.chain([client.search_runs(first, wanted)] if first else [], _pages(client, wanted)):
        if parent := _oldest_parent(found):
            return parent
    if named is not None:
        check_not_deleted(named, location.tracking_uri)
    return None


def find_or_create_parent(client: MlflowClient, location: RunLocation) -> Run:
    """Return the parent run of the pipeline run, in whatever experiment; created in the location's if there is none.

    MLflow cannot create one only if there is none, and steps may start at once. So a parent counts only from a certain
    age on, when every competitor can be seen: then the oldest stays, and the process that made another one deletes it.
    """
    parent = find_parent(client, location.model_copy(update={"mlflow_run_id": ""}))
    created = None
    if parent is None:
        experiment_id = find_or_create_experiment(client, location.tracking_uri, location.experiment)
        tags = {**_source_tags("skd pipeline"), PIPELINE_RUN_TAG: location.pipeline_run_id}
        name = location.run_name or f"skd-{location.pipeline_run_id[:12]}"
        parent = created = client.create_run(experiment_id, tags=tags, run_name=name)
    age = max(time.time() - parent.info.start_time / 1000, 0.0)
    if age < SETTLE_SECONDS:
        time.sleep(SETTLE_SECONDS - age)
        parent = _oldest_parent(search_everywhere(client, _of_pipeline(location))) or parent
    if created is not None and created.info.run_id != parent.info.run_id:
        client.delete_run(created.info.run_id)
    return parent


def children_of(client: MlflowClient, parent: Run) -> list[Run]:
    """Return the runs below the parent, oldest first.

    Kubeflow's plugin nests its runs as deep as the pipeline: below those that are no step of ours, others are.
    """
    found: list[Run] = []
    level = [parent]
    while level:
        below = [
            run
            for above in level
            for run in client.search_runs(
                [parent.info.experiment_id], f"tags.`{PARENT_TAG}` = '{above.info.run_id}'", max_results=PAGE_ROWS
            )
        ]
        found += below
        level = [run for run in below if TASK_TAG not in run.data.tags]
    return sorted(found, key=lambda run: (run.info.start_time, run.info.run_id))


def search_everywhere(client: MlflowClient, wanted: str, **options: Any) -> list[Run]:
    """Return the runs of all experiments for which MLflow's filter holds; `search_runs` takes the options."""
    return [run for found in _pages(client, wanted, **options) for run in found]


def _pages(client: MlflowClient, wanted: str, **options: Any) -> Iterator[list[Run]]:
    """Yield the runs for which a filter holds, a page of experiments at a time, the last changed ones first."""
    token = None
    while True:
        page = client.search_experiments(max_results=PAGE_ROWS, order_by=["last_update_time DESC"], page_token=token)
        if page:
            yield list(client.search_runs([found.experiment_id for found in page], wanted, **options))
        token = page.token
        if not token:
            return


def _find_or_create(client: MlflowClient, location: RunLocation) -> dict[str, Run]:
    parent = find_or_create_parent(client, location)
    experiment_id, parent_id = parent.info.experiment_id, parent.info.run_id
    found = client.search_runs(
        [experiment_id],
        f"tags.`{PARENT_TAG}` = '{parent_id}' and tags.`{TASK_TAG}` = '{location.step}'",
        order_by=["attributes.start_time ASC"],
        max_results=1,
    )
    if found:
        return {"parent": parent, "step": found[0]}
    tags = {
        **_source_tags(location.step),
        PARENT_TAG: parent_id,
        TASK_TAG: location.step,
        ATTEMPT_TAG: str(location.started),
    }
    step = client.create_run(experiment_id, start_time=location.started, tags=tags, run_name=location.step)
    return {"parent": parent, "step": step}


def _of_pipeline(location: RunLocation) -> str:
    return f"tags.`{PIPELINE_RUN_TAG}` = '{location.pipeline_run_id}'"


def _oldest_parent(runs: Iterable[Run]) -> Run | None:
    parents = [run for run in runs if PARENT_TAG not in run.data.tags]  # Kubeflow's plugin may tag the nested ones too
    return min(parents, key=lambda run: (run.info.start_time, run.info.run_id), default=None)


def _adopted_run(client: MlflowClient, location: RunLocation) -> Run | None:
    """Return the run named in `MLFLOW_RUN_ID`; None without the variable, or without such a run in this store."""
    if not location.mlflow_run_id:
        return None
    run = get_run(client, location.mlflow_run_id)
    if run is None:
        log.warning(
            "MLFLOW_RUN_ID=%s is no run of this tracking store; the step gets a run of its own", location.mlflow_run_id
        )
    return run


def get_run(client: MlflowClient, run_id: str) -> Run | None:
    """Return the run of an id; None if the store has none, or none that may be seen."""
    from mlflow.exceptions import MlflowException

    try:
        return client.get_run(run_id)
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "PERMISSION_DENIED"):
            raise
        return None


def _root_of(client: MlflowClient, run: Run) -> Run:
    """Return the root of a run's tree: Kubeflow's plugin nests a step in the runs of each DAG that it is in."""
    seen = {run.info.run_id}
    while (above := run.data.tags.get(PARENT_TAG)) and above not in seen:
        seen.add(above)
        parent = get_run(client, above)
        if parent is None:
            return run
        run = parent
    return run


def _source_tags(source: str) -> dict[str, str]:
    tags = {
        "mlflow.source.name": source,
        "skd.version": __version__,
        "mlflow.user": os.environ.get("USER"),
        IMAGE_TAG: os.environ.get(IMAGE_VARIABLE),
    }
    return {name: value for name, value in tags.items() if value}
