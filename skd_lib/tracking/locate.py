"""Which MLflow runs belong to a step: found by their tags, adopted from Kubeflow, or made."""

from __future__ import annotations

import logging
import os
import time
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict

from skd_lib import __version__
from skd_lib.tracking.client import find_or_create_experiment

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
"""Holds the image a step runs in; the compiled pipeline sets it."""
SETTLE_SECONDS = 1.0


class Place(BaseModel):
    """Where one attempt at a step logs to.

    Attributes:
        tracking_uri: The store, see `client.connect`.
        experiment: MLflow experiment.
        pipeline_run_id: The pipeline run.
        step: The step.
        run_name: Name of the parent run, for whoever makes it.
        mlflow_run_id: The run that Kubeflow made for this step; empty: none.
        started: When the attempt began, in milliseconds.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    tracking_uri: str
    experiment: str
    pipeline_run_id: str
    step: str
    run_name: str | None
    mlflow_run_id: str
    started: int


def locate(client: MlflowClient, place: Place, *, reopen: bool) -> dict[str, Run]:
    """The runs `step` and `parent`, made if need be.

    Args:
        client: Of the store.
        place: Where the step logs to.
        reopen: The step is running: its runs are marked so, and the attempt as the latest.

    Raises:
        SkdError: the experiment was deleted.
        MlflowException: the store does not answer.
    """
    runs = _adopt(client, place) or _find_or_create(client, place)
    if reopen:
        for run in runs.values():
            if run.info.status != "RUNNING":
                client.update_run(run.info.run_id, status="RUNNING")
        step = runs["step"]
        if step.data.tags.get(ATTEMPT_TAG) != str(place.started):
            client.set_tag(step.info.run_id, ATTEMPT_TAG, str(place.started))
    return runs


def find_parent(client: MlflowClient, place: Place) -> Run | None:
    """The parent run of the pipeline run, if there is one."""
    adopted = _adopted_run(client, place)
    parent = _parent_of(client, adopted) if adopted else None
    experiment_id = find_or_create_experiment(client, place.tracking_uri, place.experiment)
    return parent or _find_parent(client, experiment_id, place.pipeline_run_id)


def find_or_create_parent(client: MlflowClient, place: Place) -> Run:
    """The parent run of the pipeline run, made if need be.

    MLflow cannot create one only if there is none, and steps may start at once. So a parent is taken for settled at a
    certain age only, when every competitor can be seen: then the oldest stays, and whoever made another one withdraws
    it.

    Raises:
        SkdError: the experiment was deleted.
        MlflowException: the store does not answer.
    """
    experiment_id = find_or_create_experiment(client, place.tracking_uri, place.experiment)
    parent = _find_parent(client, experiment_id, place.pipeline_run_id)
    created = None
    if parent is None:
        tags = {**_source_tags("skd pipeline"), PIPELINE_RUN_TAG: place.pipeline_run_id}
        name = place.run_name or f"skd-{place.pipeline_run_id[:12]}"
        parent = created = client.create_run(experiment_id, tags=tags, run_name=name)
    age = max(time.time() - parent.info.start_time / 1000, 0.0)
    if age < SETTLE_SECONDS:
        time.sleep(SETTLE_SECONDS - age)
        parent = _find_parent(client, experiment_id, place.pipeline_run_id) or parent
    if created is not None and created.info.run_id != parent.info.run_id:
        client.delete_run(created.info.run_id)
    return parent


def children_of(client: MlflowClient, parent: Run) -> list[Run]:
    """The runs of the steps, oldest first."""
    wanted = f"tags.`{PARENT_TAG}` = '{parent.info.run_id}'"
    return list(client.search_runs([parent.info.experiment_id], wanted, order_by=["attributes.start_time ASC"]))


def _adopt(client: MlflowClient, place: Place) -> dict[str, Run] | None:
    """The run that Kubeflow made for this step, and its parent."""
    run = _adopted_run(client, place)
    if run is None:
        return None
    if TASK_TAG not in run.data.tags:
        client.set_tag(run.info.run_id, TASK_TAG, place.step)
    return {"step": run, "parent": _parent_of(client, run) or run}


def _find_or_create(client: MlflowClient, place: Place) -> dict[str, Run]:
    parent = find_or_create_parent(client, place)
    experiment_id, parent_id = parent.info.experiment_id, parent.info.run_id
    found = client.search_runs(
        [experiment_id],
        f"tags.`{PARENT_TAG}` = '{parent_id}' and tags.`{TASK_TAG}` = '{place.step}'",
        order_by=["attributes.start_time ASC"],
        max_results=1,
    )
    if found:
        return {"parent": parent, "step": found[0]}
    tags = {
        **_source_tags(place.step),
        PARENT_TAG: parent_id,
        TASK_TAG: place.step,
        ATTEMPT_TAG: str(place.started),
    }
    step = client.create_run(experiment_id, start_time=place.started, tags=tags, run_name=place.step)
    return {"parent": parent, "step": step}


def _find_parent(client: MlflowClient, experiment_id: str, pipeline_run_id: str) -> Run | None:
    runs = client.search_runs(
        [experiment_id], f"tags.`{PIPELINE_RUN_TAG}` = '{pipeline_run_id}'", order_by=["attributes.start_time ASC"]
    )
    parents = [run for run in runs if PARENT_TAG not in run.data.tags]  # Kubeflow's plugin may tag the nested ones too
    return min(parents, key=lambda run: (run.info.start_time, run.info.run_id), default=None)


def _adopted_run(client: MlflowClient, place: Place) -> Run | None:
    """The run named in `MLFLOW_RUN_ID`; None if there is no such variable, or no such run in this store."""
    from mlflow.exceptions import MlflowException

    if not place.mlflow_run_id:
        return None
    try:
        return client.get_run(place.mlflow_run_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        log.warning(
            "MLFLOW_RUN_ID=%s is no run of this tracking store; the step gets a run of its own", place.mlflow_run_id
        )
        return None


def _parent_of(client: MlflowClient, run: Run) -> Run | None:
    parent_id = run.data.tags.get(PARENT_TAG)
    return client.get_run(parent_id) if parent_id else None


def _source_tags(source: str) -> dict[str, str]:
    told = {"mlflow.user": os.environ.get("USER"), IMAGE_TAG: os.environ.get(IMAGE_VARIABLE)}
    return {
        "mlflow.source.name": source,
        "skd.version": __version__,
        **{name: value for name, value in told.items() if value},
    }
