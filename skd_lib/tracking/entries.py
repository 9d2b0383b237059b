"""The records that a step logs: values that can wait on disk, and be sent later, or twice without effect."""

from __future__ import annotations

import base64
import json
import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, TypeAdapter

from skd_lib._core.uris import shown
from skd_lib.tracking.client import TAG_LENGTH, brief, check_not_deleted, clip, connect
from skd_lib.tracking.ending import PipelineClosing
from skd_lib.tracking.locate import ATTEMPT_TAG, ERROR_TAG, Record, RunLocation, locate
from skd_lib.tracking.models import LoggedModels
from skd_lib.tracking.view import View

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

log = logging.getLogger(__name__)

# MLflow's limits (mlflow/utils/validation.py): a request beyond them is refused as a whole.
_BATCH_SIZES = {"params": 100, "tags": 100, "metrics": 1000}
DIGEST_LENGTH = 36
Kind = Literal["params", "tags", "metrics"]
PARAM_PREFIX = "skd/"
REFUSALS = (
    "INVALID_PARAMETER_VALUE",
    "RESOURCE_DOES_NOT_EXIST",
    "BAD_REQUEST",
    "ENDPOINT_NOT_FOUND",  # of an older server, which does not know data sets
    "NOT_IMPLEMENTED",
)
"""MLflow's codes for a request whose content it refuses, however often it is asked."""


class LoggedRun:
    """A run to send to, in the state before this attempt; `superseded` by a later one, whose tags and status stand."""

    def __init__(self, run: Run, *, superseded: bool = False) -> None:
        self.run, self.superseded = run, superseded
        self.run_id = str(run.info.run_id)
        self.figures: dict[str, float] = dict(run.data.metrics)
        """The latest value of each metric."""
        self._steps: dict[str, frozenset[int]] = {}

    def steps_before(self, client: MlflowClient, key: str) -> frozenset[int]:
        """Return the steps of metric `key` that were there already."""
        if key not in self._steps:
            history = client.get_metric_history(self.run_id, key) if key in self.run.data.metrics else []
            self._steps[key] = frozenset(metric.step for metric in history)
        return self._steps[key]


class Params(Record):
    """Parameters; see `RunLog.log_params`."""

    kind: Literal["params"] = "params"
    values: dict[str, str]

    def send(self, client: MlflowClient, target: LoggedRun) -> None:
        """Send the missing ones; tag those that differ."""
        from mlflow.entities import Param, RunTag

        known = client.get_run(target.run_id).data.params
        new = [Param(key, value) for key, value in self.values.items() if key not in known]
        changed = {key: value for key, value in self.values.items() if known.get(key, value) != value}
        _send_batches(client, target.run_id, "params", new)
        for key, value in changed.items():
            log.warning("%s was %s when this run began and is %s now; MLflow keeps the first", key, known[key], value)
        tags = [
            RunTag(f"skd.changed.{key.removeprefix(PARAM_PREFIX)}", clip(f"{known[key]} -> {value}", TAG_LENGTH))
            for key, value in changed.items()
        ]
        _send_batches(client, target.run_id, "tags", tags)


class Metrics(Record):
    """Numbers; see `RunLog.log_metrics`. MLflow keeps a point with the same time, step and value once."""

    kind: Literal["metrics"] = "metrics"
    values: dict[str, float]
    step: int | None

    def send(self, client: MlflowClient, target: LoggedRun) -> None:
        """Send the points that the run did not have when it was resumed, and final figures that differ."""
        from mlflow.entities import Metric

        def is_new(key: str, value: float) -> bool:
            if self.step is None:
                return target.figures.get(key) != value
            return self.step not in target.steps_before(client, key)

        new = {key: value for key, value in self.values.items() if is_new(key, value)}
        batch = [Metric(key, value, self.at, self.step or 0) for key, value in new.items()]
        _send_batches(client, target.run_id, "metrics", batch)
        target.figures |= self.values


class DatasetUse(Record):
    """Data that the run read; see `RunLog.log_dataset`."""

    kind: Literal["dataset"] = "dataset"
    name: str
    digest: str
    source: str
    context: str
    rows: int | None

    def send(self, client: MlflowClient, target: LoggedRun) -> None:
        """Send it; MLflow keeps a data set of the same name and digest once."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        profile = {"sha256": self.digest, **({} if self.rows is None else {"num_rows": self.rows})}
        dataset = Dataset(
            name=self.name,
            digest=self.digest[:DIGEST_LENGTH],
            source_type=self.source.partition("://")[0] if "://" in self.source else "local",
            source=json.dumps({"uri": self.source}),
            profile=json.dumps(profile),
        )
        client.log_inputs(target.run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", self.context)])])


class Artifact(Record):
    """A small file, with its content, since the file itself may be gone when the store answers again."""

    kind: Literal["artifact"] = "artifact"
    name: str
    folder: str | None
    content: str

    @classmethod
    def of(cls, content: bytes, name: str, folder: str | None, which: Literal["step", "parent"]) -> Artifact:
        """Return a file of this content, as artifact `folder/name`."""
        return cls(which=which, name=name, folder=folder, content=base64.b64encode(content).decode())

    def send(self, client: MlflowClient, target: LoggedRun) -> None:
        """Send it; an artifact of the same name is replaced."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / self.name
            path.write_bytes(base64.b64decode(self.content))
            client.log_artifact(target.run_id, str(path), artifact_path=self.folder)


class Table(Record):
    """A table; see `RunLog.log_table`."""

    kind: Literal["table"] = "table"
    columns: dict[str, list[Any]]
    path: str

    def send(self, client: MlflowClient, target: LoggedRun) -> None:
        """Send it, unless it is there already: MLflow would append to it."""
        folder = self.path.rpartition("/")[0] or None
        if all(artifact.path != self.path for artifact in client.list_artifacts(target.run_id, folder)):
            client.log_table(target.run_id, self.columns, self.path)


class Tags(Record):
    """Tags; one of the same name is replaced."""

    kind: Literal["tags"] = "tags"
    values: dict[str, str]

    def send(self, client: MlflowClient, target: LoggedRun) -> None:
        """Send them, unless a later attempt has begun: its tags stand."""
        from mlflow.entities import RunTag

        if not target.superseded:
            _send_batches(client, target.run_id, "tags", [RunTag(key, value) for key, value in self.values.items()])


class Closing(Record):
    """The step's end: FINISHED, FAILED or KILLED."""

    kind: Literal["closing"] = "closing"
    status: str

    def send(self, client: MlflowClient, target: LoggedRun) -> None:
        """Give the run its status, unless a later attempt has begun."""
        if target.superseded:
            return
        if self.status == "FINISHED" and ERROR_TAG in client.get_run(target.run_id).data.tags:
            client.delete_tag(target.run_id, ERROR_TAG)  # of an earlier attempt, which may have sent it late
        client.set_terminated(target.run_id, self.status, self.at)


Entry = Params | Metrics | DatasetUse | Artifact | Table | Tags | Closing | PipelineClosing | LoggedModels | View
ENTRY: TypeAdapter[Entry] = TypeAdapter(Annotated[Entry, Field(discriminator="kind")])


class Sender:
    """Sends entries to their runs, which are marked as running, with this attempt as the latest, if the step is."""

    def __init__(self, location: RunLocation, *, running: bool) -> None:
        self.location, self._running = location, running
        self.client: MlflowClient = connect(location.tracking_uri)
        self.targets: dict[str, LoggedRun] = {}
        self.refused = 0

    def open(self) -> None:
        """Find or create the runs."""
        if not self.targets:
            runs = locate(self.client, self.location, reopen=self._running)
            latest = int(runs["step"].data.tags.get(ATTEMPT_TAG, 0))
            superseded = not self._running and latest > self.location.started
            self.targets = {which: LoggedRun(run, superseded=superseded) for which, run in runs.items()}

    def send(self, entry: Entry) -> None:
        """Send one entry; one whose content the store refuses is left out, with a warning.

        Raises:
            Deleted: the experiment was deleted, but can be restored.
        """
        from mlflow.exceptions import MlflowException

        if isinstance(entry, PipelineClosing):
            entry.close(self.client, self.location)
            return
        self.open()
        try:
            if isinstance(entry, LoggedModels):
                entry.send(self.client, self.targets["parent"], self.targets["step"])
            else:
                entry.send(self.client, self.targets[entry.which])
        except MlflowException as error:
            if error.error_code not in REFUSALS:
                raise
            experiment = self.client.get_experiment(self.targets["parent"].run.info.experiment_id)
            check_not_deleted(experiment, self.location.tracking_uri)
            self.refused += 1
            uri = shown(self.location.tracking_uri)
            log.warning("MLflow at %s refused a request, which is left out: %s", uri, brief(error))


def _send_batches(client: MlflowClient, run_id: str, kind: Kind, items: Sequence[Any]) -> None:
    """Send parameters, tags or points; of a batch that MLflow refuses, each by itself; what it refuses is left out.

    Raises:
        MlflowException: the store does not answer, the run was deleted, or something had to be left out, once all else
            is sent.
    """
    from mlflow.exceptions import MlflowException

    size = _BATCH_SIZES[kind]
    refusals: list[Exception] = []
    for start in range(0, len(items), size):
        batch = items[start : start + size]
        try:
            client.log_batch(run_id, **{kind: batch})  # type: ignore[arg-type]
        except MlflowException as error:
            if error.error_code not in REFUSALS or client.get_run(run_id).info.lifecycle_stage == "deleted":
                raise
            refusals += filter(None, [_send_alone(client, run_id, kind, item) for item in batch])
    if refusals:
        raise refusals[0]


def _send_alone(client: MlflowClient, run_id: str, kind: Kind, item: Any) -> Exception | None:
    """Send one parameter, tag or point; return the store's refusal, if it refuses."""
    from mlflow.exceptions import MlflowException

    try:
        client.log_batch(run_id, **{kind: [item]})  # type: ignore[arg-type]
    except MlflowException as error:
        if error.error_code not in REFUSALS:
            raise
        log.warning("MLflow does not take %s, which is left out: %s", item.key, brief(error))
        return error
    return None
