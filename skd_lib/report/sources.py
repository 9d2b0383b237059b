"""The figures and samples of a finished run, read from its folder or its MLflow run."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from skd_lib._core.uris import shown
from skd_lib.errors import SkdError
from skd_lib.models.records import SAMPLES, SampledSequence, read_samples
from skd_lib.report.summary import Summary

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

SUMMARY, PAGE = "summary.json", "report.html"
"""Names of the files, in a run's folder and among its MLflow artifacts, as is `SAMPLES`."""


@dataclass(frozen=True)
class Findings:
    """The content of a run's page."""

    summary: Summary
    samples: list[SampledSequence]


def from_folder(folder: Path) -> Findings:
    """Read the files of `skd run`."""
    if not (folder / SUMMARY).is_file():
        raise SkdError(
            f"there is no {SUMMARY}, so there is nothing to report yet",
            where=str(folder),
            hint="name the folder of a run that has finished, e.g. runs/demo; `skd run CONFIG` goes on with one that "
            "has not",
        )
    samples = folder / SAMPLES
    return Findings(Summary.read(folder / SUMMARY), read_samples(samples) if samples.is_file() else [])


def from_mlflow(run_id: str, tracking_uri: str) -> Findings:
    """Fetch the files that step `report` logged.

    `run_id` is that of the pipeline's run, or of one of its steps.
    """
    from skd_lib.tracking.client import brief, connect, run_url, unanswered
    from skd_lib.tracking.view import runs_url

    client = connect(tracking_uri)
    where = f"MLflow run {run_id} at {shown(tracking_uri)}"
    try:
        run = _pipeline_run(client, run_id)
        with tempfile.TemporaryDirectory() as folder:
            names = {file.path for file in client.list_artifacts(run.info.run_id)} & {SUMMARY, SAMPLES}
            if SUMMARY not in names:
                raise SkdError(
                    f"the run has no {SUMMARY}", where=where, hint="name the parent run of a finished pipeline"
                )
            for name in names:
                client.download_artifacts(run.info.run_id, name, folder)
            found = from_folder(Path(folder))
    except unanswered() as error:
        raise SkdError(
            f"the run cannot be read: {brief(error)}", where=where, hint="check the run id and --tracking-uri"
        ) from error
    address = {
        "mlflow_run_id": run.info.run_id,
        "mlflow_url": run_url(tracking_uri, run),
        "mlflow_table_url": runs_url(tracking_uri, run.info.experiment_id),
    }
    return Findings(found.summary.model_copy(update=address), found.samples)


def _pipeline_run(client: MlflowClient, run_id: str) -> Run:
    from skd_lib.tracking.locate import PARENT_TAG

    run = client.get_run(run_id)
    parent = run.data.tags.get(PARENT_TAG)
    return client.get_run(parent) if parent else run
