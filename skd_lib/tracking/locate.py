"""Which MLflow runs belong to a step: found by their tags, adopted from Kubeflow, or made."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

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
"""Holds the image a step runs in; the compiled pipeline sets it."""
SETTLE_SECONDS = 1.0
_MOST = 1000
"""Rows of one answer: MLflow's own limit for experiments."""
_seen_in: dict[tuple[str, str], str] = {}
"""Experiment of a pipeline run's parent, by store and pipeline run, where that is not the steps' own."""


class Place(BaseModel):
    """Where one attempt at a step logs to.

    Attributes:
        tracking_uri: The store, see `client.connect`.
        experiment: MLflow experiment for a parent run, where there is none yet.
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
        reopen: The step is running: its runs are marked so, and the attempt as the latest, with no error yet.

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
            if ERROR_TAG in step.data.tags:
                client.delete_tag(step.info.run_id, ERROR_TAG)  # of an attempt before this one
    return runs


def find_parent(client: MlflowClient, place: Place) -> Run | None:
    """The parent run of the pipeline run, in whatever experiment it is; None if there is none.

    Raises:
        Deleted: there is none, and the place's experiment, in which it may be, was deleted.
        MlflowException: the store does not answer.
    """
    adopted = _adopted_run(client, place)
    if adopted is not None and PARENT_TAG in adopted.data.tags:
        return _root_of(client, adopted)
    named = find_experiment(client, place.experiment)
    deleted = named is not None and named.lifecycle_stage == "deleted"
    parent = _find_parent(client, place, "" if named is None or deleted else named.experiment_id)
    if parent is None and named is not None:
        check_not_deleted(named, place.tracking_uri)
    return parent


def find_or_create_parent(client: MlflowClient, place: Place) -> Run:
    """The parent run of the pipeline run, in whatever experiment it is; made in the place's if there is none.

    MLflow cannot create one only if there is none, and steps may start at once. So a parent is taken for settled at a
    certain age only, when every competitor can be seen: then the oldest stays, and whoever made another one withdraws
    it.

    Raises:
        SkdError: the experiment was deleted.
        MlflowException: the store does not answer.
    """
    parent = find_parent(client, place.model_copy(update={"mlflow_run_id": ""}))
    created = None
    if parent is None:
        experiment_id = find_or_create_experiment(client, place.tracking_uri, place.experiment)
        tags = {**_source_tags("skd pipeline"), PIPELINE_RUN_TAG: place.pipeline_run_id}
        name = place.run_name or f"skd-{place.pipeline_run_id[:12]}"
        parent = created = client.create_run(experiment_id, tags=tags, run_name=name)
    age = max(time.time() - parent.info.start_time / 1000, 0.0)
    if age < SETTLE_SECONDS:
        time.sleep(SETTLE_SECONDS - age)
        parent = _oldest_parent(search_everywhere(client, _of_pipeline(place))) or parent
    if created is not None and created.info.run_id != parent.info.run_id:
        client.delete_run(created.info.run_id)
    return parent


def children_of(client: MlflowClient, parent: Run) -> list[Run]:
    """The runs below the parent, oldest first.

    Kubeflow's plugin nests its runs as deep as the pipeline: below those that are no step of ours, others are.
    """
    found: list[Run] = []
    level = [parent]
    while level:
        below = [
            run
            for above in level
            for run in client.search_runs(
                [parent.info.experiment_id], f"tags.`{PARENT_TAG}` = '{above.info.run_id}'", max_results=_MOST
            )
        ]
        found += below
        level = [run for run in below if TASK_TAG not in run.data.tags]
    return sorted(found, key=lambda run: (run.info.start_time, run.info.run_id))


def search_everywhere(client: MlflowClient, wanted: str, **options: Any) -> list[Run]:
    """The runs of all experiments for which a filter holds.

    Args:
        client: Of the store.
        wanted: MLflow's filter.
        options: Of `MlflowClient.search_runs`, for each thousand of experiments.
    """
    return [run for found in _pages(client, wanted, **options) for run in found]


def _pages(client: MlflowClient, wanted: str, **options: Any) -> Iterator[list[Run]]:
    """The runs for which a filter holds, a thousand experiments at a time, those with the latest changes first."""
    token = None
    while True:
        page = client.search_experiments(max_results=_MOST, order_by=["last_update_time DESC"], page_token=token)
        if page:
            yield list(client.search_runs([found.experiment_id for found in page], wanted, **options))
        token = page.token
        if not token:
            return


def _adopt(client: MlflowClient, place: Place) -> dict[str, Run] | None:
    """The run that Kubeflow made for this step, and the root of the tree that it is in."""
    from mlflow.entities import RunTag

    run = _adopted_run(client, place)
    if run is None:
        return None
    if TASK_TAG not in run.data.tags:
        tags = {**_source_tags(place.step), TASK_TAG: place.step}
        client.log_batch(run.info.run_id, tags=[RunTag(name, value) for name, value in tags.items()])
    return {"step": run, "parent": _root_of(client, run)}


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


def _find_parent(client: MlflowClient, place: Place, named: str) -> Run | None:
    """Look where the parent was the last time, then in the place's experiment, at last in all."""
    wanted, key = _of_pipeline(place), (place.tracking_uri, place.pipeline_run_id)
    for experiment_id in dict.fromkeys(filter(None, (_seen_in.get(key), named))):
        if parent := _oldest_parent(client.search_runs([experiment_id], wanted)):
            return parent
    for found in _pages(client, wanted):
        if parent := _oldest_parent(found):
            _seen_in[key] = parent.info.experiment_id
            return parent
    return None


def _of_pipeline(place: Place) -> str:
    return f"tags.`{PIPELINE_RUN_TAG}` = '{place.pipeline_run_id}'"


def _oldest_parent(runs: Iterable[Run]) -> Run | None:
    parents = [run for run in runs if PARENT_TAG not in run.data.tags]  # Kubeflow's plugin may tag the nested ones too
    return min(parents, key=lambda run: (run.info.start_time, run.info.run_id), default=None)


def _adopted_run(client: MlflowClient, place: Place) -> Run | None:
    """The run named in `MLFLOW_RUN_ID`; None if there is no such variable, or no such run in this store."""
    if not place.mlflow_run_id:
        return None
    run = get_run(client, place.mlflow_run_id)
    if run is None:
        log.warning(
            "MLFLOW_RUN_ID=%s is no run of this tracking store; the step gets a run of its own", place.mlflow_run_id
        )
    return run


def get_run(client: MlflowClient, run_id: str) -> Run | None:
    """The run of an id; None if the store has none, or none that may be seen.

    Raises:
        MlflowException: the store does not answer.
    """
    from mlflow.exceptions import MlflowException

    try:
        return client.get_run(run_id)
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "PERMISSION_DENIED"):
            raise
        return None


def _root_of(client: MlflowClient, run: Run) -> Run:
    """The root of a run's tree: Kubeflow's plugin nests a step in the runs of each DAG that it is in."""
    seen = {run.info.run_id}
    while (above := run.data.tags.get(PARENT_TAG)) and above not in seen:
        seen.add(above)
        parent = get_run(client, above)
        if parent is None:
            return run
        run = parent
    return run


def _source_tags(source: str) -> dict[str, str]:
    told = {"mlflow.user": os.environ.get("USER"), IMAGE_TAG: os.environ.get(IMAGE_VARIABLE)}
    return {
        "mlflow.source.name": source,
        "skd.version": __version__,
        **{name: value for name, value in told.items() if value},
    }
