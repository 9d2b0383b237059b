"""MLflow runs: one parent run for each pipeline run, one nested run for each step.

    with step_run(step="distill", tracking_uri=uri, experiment="skd", params={...}) as run:
        run.log_metrics({"loss": 1.0}, step=3)
        run.parent.log_metrics({"student_after/chrf": 30.5})

Runs are found by their tags (`kfp.pipeline_run_id` on the parent, `kfp.task` and `mlflow.parentRunId` on the step's
run), so a retried or resumed step goes on in its run. The parent may be in any experiment. Where Kubeflow's own MLflow
plugin made the step's run it says so in `MLFLOW_RUN_ID`, and that run is adopted; the parent is then the root of its
tree, whose runs are nested as deep as the pipeline.

A tracking store that does not answer must not kill hours of training: the step warns once and goes on, and its records
wait in the outbox.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import threading
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Literal

from skd_lib._core.machine import is_main_process, pipeline_run_id
from skd_lib._core.uris import redacted
from skd_lib.tracking.client import PARAM_LENGTH, TAG_LENGTH, clip, connect, run_page, run_url, untaken
from skd_lib.tracking.ending import STATE_TAG, PipelineClosing, Seen
from skd_lib.tracking.entries import (
    DIGEST_LENGTH,
    PARAM_PREFIX,
    Artifact,
    Closing,
    DatasetUse,
    Metrics,
    Params,
    Table,
    Tags,
)
from skd_lib.tracking.locate import ERROR_TAG, RunLocation, find_parent
from skd_lib.tracking.models import LoggedModels, ModelRecord
from skd_lib.tracking.outbox import Outbox
from skd_lib.tracking.view import View, runs_url


class RunLog:
    """One MLflow run to log to. Without tracking every method does nothing."""

    def __init__(self, outbox: Outbox, which: Literal["step", "parent"]) -> None:
        self._outbox, self._which = outbox, which

    @property
    def run_id(self) -> str:
        """The run's id; empty without tracking or while the store has not answered yet."""
        run = self._outbox.runs.get(self._which)
        return str(run.info.run_id) if run is not None else ""

    @property
    def url(self) -> str:
        """Address of the run's page; empty where the store is no server, or has not answered yet."""
        run = self._outbox.runs.get(self._which)
        return "" if run is None else run_url(self._outbox.uri, run)

    @property
    def page(self) -> str:
        """Address of the run's page below that of whatever server shows the store; empty until it has answered."""
        run = self._outbox.runs.get(self._which)
        return "" if run is None else run_page(run)

    @property
    def table_url(self) -> str:
        """Address of the runs table with this run in it; see `view`."""
        run = self._outbox.runs.get(self._which)
        return "" if run is None else runs_url(self._outbox.uri, run.info.experiment_id)

    def find(self) -> str:
        """Return the run's id, for which a store that was silent is asked again.

        Raises:
            ConnectionError: it still is.
        """
        if not self.run_id and not self._outbox.insist():
            raise ConnectionError("the run of this step is not known there yet")
        return self.run_id

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Log parameters as `skd/NAME`; nested mappings become `skd/OUTER.INNER`.

        MLflow refuses a whole batch for one changed value, so only missing ones are sent. One that differs (a resumed
        run with another configuration) keeps its first value; a warning and the tag `skd.changed.NAME` say so.
        """
        values = {PARAM_PREFIX + name: _param_text(value) for name, value in _flat(params)}
        self._outbox.log(Params(which=self._which, values=values))

    def log_metrics(self, metrics: Mapping[str, float], *, step: int | None = None) -> None:
        """Log numbers, with the step they belong to or, without one, as the run's final figures.

        A step that the run already had when it was resumed is left out key by key, so that a training step that goes
        on from an earlier checkpoint writes no point of its curves twice.
        """
        if metrics:
            values = {key: float(value) for key, value in metrics.items()}
            self._outbox.log(Metrics(which=self._which, values=values, step=step))

    def log_dataset(
        self, name: str, digest: str, source: str, context: str = "train", *, rows: int | None = None
    ) -> None:
        """Record data that the run read for the use `context` (`train`, `validation`, `test`), with its sha256."""
        use = DatasetUse(which=self._which, name=name, digest=digest, source=source, context=context, rows=rows)
        self._outbox.log(use)

    def show_metrics(self, names: Sequence[str]) -> None:
        """Let the experiment's runs table show these metrics, with a chart of each; see `view`."""
        self._outbox.log(View(which=self._which, metrics=list(names)))

    def log_artifact(self, path: Path, folder: str | None = None) -> None:
        """Copy a small file (a report, a table) to the run. Weights are never sent through the tracking server."""
        content = path.read_bytes()
        self._outbox.log(Artifact.of(content, path.name, folder, self._which))

    def log_text(self, text: str, name: str) -> None:
        """Keep a small text as the run's artifact `name`, which may hold a folder: `report/summary.json`."""
        folder, _, file = name.rpartition("/")
        self._outbox.log(Artifact.of(redacted(text).encode(), file, folder or None, self._which))

    def log_table(self, columns: Mapping[str, list[Any]], name: str) -> None:
        """Keep a table that MLflow's page can show, as the artifact `NAME-DIGEST.json`; an empty one is left out.

        MLflow appends to a table of the same name: the digest lets a step that is retried log it once.
        """
        digest = hashlib.sha256(json.dumps(columns, sort_keys=True).encode()).hexdigest()[:8]
        if any(columns.values()):
            self._outbox.log(Table(which=self._which, columns=dict(columns), path=f"{name}-{digest}.json"))

    def set_tags(self, tags: Mapping[str, Any]) -> None:
        """Set tags; a tag of the same name is replaced."""
        if tags:
            values = {key: clip(redacted(str(value)), TAG_LENGTH) for key, value in tags.items()}
            self._outbox.log(Tags(which=self._which, values=values))


class StepRun(RunLog):
    """The run of one step, and through `parent` the run of the whole pipeline."""

    def __init__(self, outbox: Outbox) -> None:
        super().__init__(outbox, "step")
        self.parent = RunLog(outbox, "parent")

    def log_models(self, models: Sequence[ModelRecord], dataset: tuple[str, str] | None = None) -> None:
        """Record the models of the pipeline run; `dataset` is the name and sha256 of what they were measured on."""
        if models:
            named = dataset and (dataset[0], dataset[1][:DIGEST_LENGTH])
            self._outbox.log(LoggedModels(models=list(models), dataset=named))


@contextmanager
def step_run(
    *,
    step: str,
    tracking_uri: str,
    experiment: str,
    run_name: str | None = None,
    params: Mapping[str, Any] | None = None,
    checkpoint_root: str = "",
) -> Iterator[StepRun]:
    """Track one step: FINISHED if the body ends, FAILED with the tag `skd.error` if it raises, KILLED on SIGTERM.

    The pipeline run is that of `KFP_RUN_ID`; without the variable (a step run by hand) it is a new one. `MLFLOW_RUN_ID`
    names a run that Kubeflow made for this step. Of a distributed job only rank 0 tracks.

    Args:
        step: Name of the step, with its role where a step runs several times, e.g. `evaluate-student_after`.
        tracking_uri: See `client.connect`; empty: no tracking, and a run whose methods do nothing.
        experiment: MLflow experiment for a parent run, where the pipeline run has none yet; created if missing.
        run_name: Name of the parent run, used by the step that creates it.
        params: Logged on the step's run, see `RunLog.log_params`.
        checkpoint_root: Folder or URI of storage that outlives the pod. Records that the store has not taken when the
            step ends are left in `tracking` there, unless `SKD_TRACKING_BUFFER` names another place.
    """
    uri = tracking_uri if is_main_process() else ""
    keep = f"{checkpoint_root.rstrip('/')}/tracking" if checkpoint_root else ""
    outbox = Outbox(_location(uri, experiment, pipeline_run_id() or str(uuid.uuid4()), step, run_name), keep)
    run = StepRun(outbox)
    outbox.open()
    if params:
        run.log_params(params)
    try:
        with _terminated_as_exit():
            yield run
    except Exception as error:
        run.set_tags({ERROR_TAG: f"{type(error).__name__}: {error}"})
        outbox.close(Closing(status="FAILED"))
        raise
    except BaseException:  # SystemExit of SIGTERM, KeyboardInterrupt
        outbox.close(Closing(status="KILLED"))
        raise
    outbox.close(Closing(status="FINISHED"))


def close_pipeline_run(
    *,
    tracking_uri: str,
    experiment: str,
    pipeline_run_id: str,
    state: str,
    error: str = "",
    seen: Seen = Seen(),  # noqa: B008 - it cannot be changed
) -> bool:
    """Close a pipeline's parent run, and runs of steps that were killed before they could close them.

    State (COMPLETE, FAILED, RUNNING, ...) and error are KFP's, `seen` is the answer of its API: see
    `ending.find_ending`. The run is found in any experiment. Return whether there is one and the store took the change.
    """
    if not tracking_uri:
        return False
    location = _location(tracking_uri, experiment, pipeline_run_id, "finish")
    closing = PipelineClosing(state=state, error=redacted(error), seen=seen)
    try:
        return closing.close(connect(tracking_uri), location)
    except untaken() as silence:
        Outbox(location).put_off(closing, silence)
        return False


@dataclass(frozen=True)
class PipelineRecord:
    """MLflow's record of a pipeline run, as far as known."""

    url: str = ""
    table_url: str = ""
    figures: Mapping[str, float] = field(default_factory=dict)
    state: str = ""
    error: str = ""


def pipeline_record(*, tracking_uri: str, experiment: str, pipeline_run_id: str) -> PipelineRecord:
    """Read a pipeline's parent run; nothing is in the record without tracking, or if the store is silent."""
    if not tracking_uri:
        return PipelineRecord()
    try:
        location = _location(tracking_uri, experiment, pipeline_run_id, "finish")
        parent = find_parent(connect(tracking_uri), location)
    except untaken():
        return PipelineRecord()
    if parent is None:
        return PipelineRecord()
    tags = parent.data.tags
    return PipelineRecord(
        url=run_url(tracking_uri, parent),
        table_url=runs_url(tracking_uri, parent.info.experiment_id),
        figures=dict(parent.data.metrics),
        state=tags.get(STATE_TAG, ""),
        error=tags.get(ERROR_TAG, ""),
    )


def _location(tracking_uri: str, experiment: str, run_id: str, step: str, run_name: str | None = None) -> RunLocation:
    return RunLocation(
        tracking_uri=tracking_uri,
        experiment=experiment,
        pipeline_run_id=run_id,
        step=step,
        run_name=run_name,
        mlflow_run_id=os.environ.get("MLFLOW_RUN_ID", ""),
    )


@contextmanager
def _terminated_as_exit() -> Iterator[None]:
    """Let SIGTERM end the body as `SystemExit`, so that the run is closed; another handler is left in location."""
    here = threading.current_thread() is threading.main_thread()
    if not here or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    def leave(number: int, _frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_IGN)  # a second one must not interrupt the closing
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _param_text(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)
    return clip(redacted(text), PARAM_LENGTH)
