"""The runs that new data has started, found by a tag on their parent run, though Kubeflow may have deleted them."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from skd_lib._core.uris import sqlite_file
from skd_lib.errors import SkdError
from skd_lib.tracking.client import brief, connect, store_name
from skd_lib.tracking.ending import CANCELED, FAILED, STATE_TAG, STOPPED, SUCCEEDED
from skd_lib.tracking.locate import PARENT_TAG, PIPELINE_RUN_TAG, RunLocation, find_or_create_parent, search_everywhere

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

TRIGGER_TAG = "skd.trigger"
"""Holds the name that a run on the same data, with the same settings and pipeline, always has in Kubeflow."""


def run_for(name: str, *, tracking_uri: str, failed: Collection[str] = ()) -> Run | None:
    """Return the newest pipeline run of that name that has not failed, in whatever experiment; nothing is changed.

    A run that a person stopped, or may have, is not to be started again either. The pipeline runs `failed` are those
    that Kubeflow calls failed, which counts unless MLflow records another end. Return its parent run, if there is one.
    """
    with _store(tracking_uri) as client:
        runs = search_everywhere(client, f"tags.`{TRIGGER_TAG}` = '{name}'")
    parents = [run for run in runs if PARENT_TAG not in run.data.tags and not _has_failed(run, failed)]
    return max(parents, key=lambda run: int(run.info.start_time), default=None)


def _has_failed(parent: Run, failed: Collection[str]) -> bool:
    end = how_it_ended(parent)
    is_listed = parent.data.tags.get(PIPELINE_RUN_TAG) in failed
    return end == FAILED or (is_listed and end not in (SUCCEEDED, CANCELED))


def how_it_ended(parent: Run) -> str:
    """Return an `Ending.state`; RUNNING if the run has not ended.

    The tag says more than the status: Kubeflow's plugin calls a run FAILED that a person stopped.
    """
    status = parent.info.status
    recorded = parent.data.tags.get(STATE_TAG, "") if status != "RUNNING" else ""
    return recorded or {"FINISHED": SUCCEEDED, "KILLED": STOPPED}.get(status, status)


def note(name: str, *, pipeline_run_id: str, run_name: str, tracking_uri: str, experiment: str) -> None:
    """Tag the parent run of a pipeline run that was started; it is created here, and its steps go on in it.

    By its name in Kubeflow `run_for` finds it; `run_name` is that of the parent run, as its first step would call it.
    """
    location = RunLocation(
        tracking_uri=tracking_uri,
        experiment=experiment,
        pipeline_run_id=pipeline_run_id,
        step="trigger",
        run_name=run_name,
    )
    with _store(tracking_uri) as client:
        client.set_tag(find_or_create_parent(client, location).info.run_id, TRIGGER_TAG, name)


@contextmanager
def _store(tracking_uri: str) -> Iterator[MlflowClient]:
    """Yield a client, all of whose errors become an `SkdError`; a sqlite file is not made."""
    where = store_name(tracking_uri)
    database = sqlite_file(tracking_uri)
    if database is not None and not database.is_file():
        raise SkdError("there is no such file on this machine", where=where)
    try:
        yield connect(tracking_uri)
    except SkdError:
        raise
    except Exception as error:  # what a proxy answers in the server's place, MLflow without its database parts, ...
        raise SkdError(f"MLflow does not answer: {brief(error)}", where=where, hint="check that it runs") from error
