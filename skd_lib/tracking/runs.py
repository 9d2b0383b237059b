"""MLflow runs: one parent run a pipeline run, one nested run a step.

    with step_run(step="distill", tracking_uri=uri, experiment="skd", params={...}) as run:
        run.log_metrics({"loss": 1.0}, step=3)
        run.parent.log_metrics({"student_after_chrf": 30.5})

Runs are found by their tags (`kfp.pipeline_run_id` on the parent, `kfp.task` and `mlflow.parentRunId` on the step's
run), so a retried or resumed step goes on in its run. Where Kubeflow's own MLflow plugin made the step's run it says
so in `MLFLOW_RUN_ID`, and that run is adopted.

A tracking store that does not answer must not kill hours of training: the step warns once and goes on. What is
logged in the meantime is LOST (nothing is kept on disk); the store is asked again every `RETRY_SECONDS`, and once it
answers the runs are made and logging goes on.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeVar

from skd_lib import __version__
from skd_lib.errors import SkdError
from skd_lib.tracking.client import brief, connect, find_or_create_experiment, run_url, unanswered

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

log = logging.getLogger(__name__)
T = TypeVar("T")

PIPELINE_RUN_TAG = "kfp.pipeline_run_id"
TASK_TAG = "kfp.task"
PARENT_TAG = "mlflow.parentRunId"
ERROR_TAG = "skd.error"
PARAM_PREFIX = "skd/"
RETRY_SECONDS = 60.0
SETTLE_SECONDS = 1.0

# MLflow's limits (mlflow/utils/validation.py): a request beyond them is refused as a whole.
_METRICS_PER_BATCH = 1000
_PARAMS_PER_BATCH = 100
_PARAM_LENGTH = 6000
_TAG_LENGTH = 5000  # older servers; newer ones take 8000
_DIGEST_LENGTH = 36


class RunLog:
    """One MLflow run to log to. Without tracking, or while the store does not answer, every method does nothing."""

    def __init__(self, link: _Link, which: str) -> None:
        self._link, self._which = link, which
        self._last_steps: dict[str, int] = {}

    @property
    def run_id(self) -> str:
        """The run's id; empty without tracking or while the store has not answered yet."""
        run = self._link.runs.get(self._which)
        return str(run.info.run_id) if run is not None else ""

    @property
    def url(self) -> str:
        """Address of the run's page; empty where the store is no server, or has not answered yet."""
        run = self._link.runs.get(self._which)
        return "" if run is None else run_url(self._link.uri, run)

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Log parameters as `skd/NAME`; nested mappings become `skd/OUTER.INNER`.

        MLflow refuses a whole batch for one changed value, so only missing ones are sent. One that differs (a resumed
        run with another configuration) keeps its first value; a warning and the tag `skd.changed.NAME` tell.
        """
        wanted = {PARAM_PREFIX + name: _param_text(value) for name, value in _flat(params)}

        def send(client: MlflowClient, run_id: str) -> None:
            from mlflow.entities import Param, RunTag

            known = client.get_run(run_id).data.params
            new = [Param(key, value) for key, value in wanted.items() if key not in known]
            changed = {key: value for key, value in wanted.items() if known.get(key, value) != value}
            for start in range(0, len(new), _PARAMS_PER_BATCH):
                client.log_batch(run_id, params=new[start : start + _PARAMS_PER_BATCH])
            for key, value in changed.items():
                log.warning(
                    "%s was %s when this run began and is %s now; MLflow keeps the first", key, known[key], value
                )
            tags = [
                RunTag(f"skd.changed.{key.removeprefix(PARAM_PREFIX)}", _clip(f"{known[key]} -> {value}", _TAG_LENGTH))
                for key, value in changed.items()
            ]
            for start in range(0, len(tags), _PARAMS_PER_BATCH):
                client.log_batch(run_id, tags=tags[start : start + _PARAMS_PER_BATCH])

        self._do(send)

    def log_metrics(self, metrics: Mapping[str, float], *, step: int | None = None) -> None:
        """Log numbers, with the step they belong to or, without one, as the run's final figures.

        A step that the run already had when it was resumed is left out key by key, so that a training step that goes
        on from an earlier checkpoint writes no point of its curves twice.
        """

        def send(client: MlflowClient, run_id: str) -> None:
            from mlflow.entities import Metric

            now = int(time.time() * 1000)
            batch = [
                Metric(key, float(value), now, step or 0)
                for key, value in metrics.items()
                if step is None or step > self._step_at_start(client, run_id, key)
            ]
            for start in range(0, len(batch), _METRICS_PER_BATCH):
                client.log_batch(run_id, metrics=batch[start : start + _METRICS_PER_BATCH])

        if metrics:
            self._do(send)

    def last_step(self, key: str) -> int:
        """The last step at which metric `key` was logged; -1 if it never was or the store does not answer."""

        def read(client: MlflowClient, run_id: str) -> int:
            return max((metric.step for metric in client.get_metric_history(run_id, key)), default=-1)

        answer = self._do(read)
        return -1 if answer is None else answer

    def log_dataset(
        self, name: str, digest: str, source: str, context: str = "train", *, rows: int | None = None
    ) -> None:
        """Record data that the run read.

        Args:
            name: Name of the data set, e.g. `train_student`.
            digest: Its sha256; MLflow shows the first 36 characters, the profile keeps all of them.
            source: URI or path it was read from.
            context: What it was used for: `train`, `validation`, `test`.
            rows: Number of examples.
        """

        def send(client: MlflowClient, run_id: str) -> None:
            from mlflow.entities import Dataset, DatasetInput, InputTag

            profile = {"sha256": digest, **({} if rows is None else {"num_rows": rows})}
            kind = source.partition("://")[0] if "://" in source else "local"
            dataset = Dataset(
                name=name,
                digest=digest[:_DIGEST_LENGTH],
                source_type=kind,
                source=json.dumps({"uri": source}),
                profile=json.dumps(profile),
            )
            client.log_inputs(run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", context)])])

        self._do(send)

    def log_artifact(self, path: Path, folder: str | None = None) -> None:
        """Copy a small file (a report, a table) to the run. Weights are never sent through the tracking server.

        Raises:
            FileNotFoundError: there is no such file.
        """
        if not path.is_file():
            raise FileNotFoundError(path)
        self._do(lambda client, run_id: client.log_artifact(run_id, str(path), artifact_path=folder))

    def log_text(self, text: str, name: str) -> None:
        """Keep a small text as the run's artifact `name`, which may hold a folder: `report/summary.json`."""
        self._do(lambda client, run_id: client.log_text(run_id, text, name))

    def log_table(self, columns: Mapping[str, list[Any]], name: str) -> None:
        """Keep a table that MLflow's page can show, as the run's artifact `NAME-DIGEST.json`; an empty one is left out.

        MLflow appends to a table of the same name. With the content's digest in its name, a step that is retried logs
        the same table once.
        """
        digest = hashlib.sha256(json.dumps(columns, sort_keys=True).encode()).hexdigest()[:8]
        path = f"{name}-{digest}.json"

        def send(client: MlflowClient, run_id: str) -> None:
            folder = path.rpartition("/")[0] or None
            if all(artifact.path != path for artifact in client.list_artifacts(run_id, folder)):
                client.log_table(run_id, dict(columns), path)

        if any(columns.values()):
            self._do(send)

    def set_tags(self, tags: Mapping[str, Any]) -> None:
        """Set tags; a tag of the same name is replaced."""

        def send(client: MlflowClient, run_id: str) -> None:
            from mlflow.entities import RunTag

            batch = [RunTag(key, _clip(str(value), _TAG_LENGTH)) for key, value in tags.items()]
            for start in range(0, len(batch), _PARAMS_PER_BATCH):
                client.log_batch(run_id, tags=batch[start : start + _PARAMS_PER_BATCH])

        if tags:
            self._do(send)

    def _do(self, action: Callable[[MlflowClient, str], T]) -> T | None:
        return self._link.attempt(lambda client: action(client, self.run_id))

    def _step_at_start(self, client: MlflowClient, run_id: str, key: str) -> int:
        """Last step of `key` that an earlier attempt logged; -1 if there was none."""
        if key not in self._last_steps:
            before = key in self._link.runs[self._which].data.metrics
            history = client.get_metric_history(run_id, key) if before else []
            self._last_steps[key] = max((metric.step for metric in history), default=-1)
        return self._last_steps[key]


class StepRun(RunLog):
    """The run of one step, and through `parent` the run of the whole pipeline."""

    def __init__(self, link: _Link) -> None:
        super().__init__(link, "step")
        self.parent = RunLog(link, "parent")


@contextmanager
def step_run(
    *,
    step: str,
    tracking_uri: str,
    experiment: str,
    run_name: str | None = None,
    params: Mapping[str, Any] | None = None,
) -> Iterator[StepRun]:
    """Track one step: FINISHED if the body ends, FAILED with the tag `skd.error` if it raises, KILLED on SIGTERM.

    Args:
        step: Name of the step, with its role where a step runs several times, e.g. `evaluate-student_after`.
        tracking_uri: See `client.connect`; empty: no tracking, and a run whose methods do nothing.
        experiment: MLflow experiment; created if missing.
        run_name: Name of the parent run, used by the step that creates it.
        params: Logged on the step's run, see `RunLog.log_params`.

    Environment:
        KFP_RUN_ID: the pipeline run; unset (a step run by hand): a pipeline run of its own.
        MLFLOW_RUN_ID: a run that Kubeflow made for this step.
        RANK: only rank 0 of a distributed job tracks.

    Raises:
        SkdError: the tracking URI is one that can never work.
    """
    if int(os.environ.get("RANK") or 0) != 0:
        tracking_uri = ""
    pipeline_run_id = os.environ.get("KFP_RUN_ID") or str(uuid.uuid4())
    link = _Link(tracking_uri, experiment, pipeline_run_id, step, run_name)
    run = StepRun(link)
    link.at_opening = lambda: run.log_params(params or {})
    link.open()
    try:
        with _terminated_as_exit():
            yield run
    except Exception as error:
        run.set_tags({ERROR_TAG: f"{type(error).__name__}: {error}"})
        link.close("FAILED")
        raise
    except BaseException:  # SystemExit of SIGTERM, KeyboardInterrupt
        link.close("KILLED")
        raise
    link.close("FINISHED")


def close_pipeline_run(
    *, tracking_uri: str, experiment: str, pipeline_run_id: str, state: str, error: str = ""
) -> bool:
    """Close a pipeline's parent run, and those of its steps that died without a word (out of memory, lost node).

    Args:
        tracking_uri: See `client.connect`; empty: nothing to do.
        experiment: MLflow experiment of the run.
        pipeline_run_id: The pipeline run.
        state: KFP's final state: SUCCEEDED, FAILED, CANCELLED, ...
        error: KFP's message, kept as tag `skd.error`.

    Returns:
        Whether there was a run to close and the store took the change.
    """
    status = {"SUCCEEDED": "FINISHED", "SKIPPED": "FINISHED", "CANCELLED": "KILLED", "CANCELED": "KILLED"}.get(
        state, "FAILED"
    )
    link = _Link(tracking_uri, experiment, pipeline_run_id, "", None)

    def close(client: MlflowClient) -> bool:
        experiment_id = find_or_create_experiment(client, tracking_uri, experiment)
        adopted = _adopted_run(client)
        parent = _parent_of(client, adopted) if adopted else None
        parent = parent or _find_parent(client, experiment_id, pipeline_run_id)
        if parent is None:
            return False
        parent_id = parent.info.run_id
        children = client.search_runs([parent.info.experiment_id], f"tags.`{PARENT_TAG}` = '{parent_id}'")
        for child in children:
            if child.info.status == "RUNNING":
                client.set_terminated(child.info.run_id, "FAILED" if status == "FINISHED" else status)
        client.set_tag(parent_id, "skd.final_state", state)
        if error:
            client.set_tag(parent_id, ERROR_TAG, _clip(error, _TAG_LENGTH))
        client.set_terminated(parent_id, status)
        return True

    return bool(link.attempt(close, needs_runs=False))


class _Link:
    """The connection to the store, the two runs once they are found, and what to do while the store is silent."""

    def __init__(
        self, tracking_uri: str, experiment: str, pipeline_run_id: str, step: str, run_name: str | None
    ) -> None:
        self.uri, self.experiment, self.pipeline_run_id = tracking_uri, experiment, pipeline_run_id
        self.step, self.run_name = step, run_name
        self.runs: dict[str, Run] = {}
        self.at_opening: Callable[[], None] = lambda: None  # also when the store answers late
        self._client: MlflowClient | None = None
        self._silent_until = -math.inf
        self._lost = 0

    def attempt(
        self, action: Callable[[MlflowClient], T], *, needs_runs: bool = True, insist: bool = False
    ) -> T | None:
        """Do `action`, or warn and return None. With `insist` the store is asked although it was silent just now."""
        if not self.uri:
            return None
        if time.monotonic() < self._silent_until and not insist:
            self._lost += 1
            return None
        try:
            self._client = self._client or connect(self.uri)
            if needs_runs and not self.runs:
                self.runs = self._locate(self._client)
                self.at_opening()
            answer = action(self._client)
        except SkdError:
            raise
        except unanswered() as error:
            self._lost += 1
            self._note(error)
            return None
        if self._silent_until > 0:
            log.info("MLflow at %s answers again", self.uri)
            self._silent_until = -math.inf
        return answer

    def open(self) -> None:
        """Find or make the runs now rather than with the first call."""
        self.attempt(lambda _client: None)

    def close(self, status: str) -> None:
        """Give the step's run its final status."""

        def terminate(client: MlflowClient) -> None:
            if status == "FINISHED" and ERROR_TAG in self.runs["step"].data.tags:
                client.delete_tag(self.runs["step"].info.run_id, ERROR_TAG)  # of an attempt before this one
            client.set_terminated(self.runs["step"].info.run_id, status)

        self.attempt(terminate, insist=True)
        if self._lost:
            log.warning("MLflow at %s missed %d calls of step %s", self.uri, self._lost, self.step)

    def _note(self, error: Exception) -> None:
        refused = getattr(error, "error_code", "") in (
            "INVALID_PARAMETER_VALUE",
            "RESOURCE_DOES_NOT_EXIST",
            "BAD_REQUEST",
        )
        if refused and self.runs:
            log.warning("MLflow at %s refused a request, which is left out: %s", self.uri, brief(error))
            return
        if self._silent_until < 0:
            log.warning(
                "MLflow at %s does not answer; the step goes on and is not tracked until it does: %s",
                self.uri,
                brief(error),
            )
        self._silent_until = time.monotonic() + RETRY_SECONDS

    def _locate(self, client: MlflowClient) -> dict[str, Run]:
        runs = self._adopt(client) or self._find_or_create(client)
        for run in runs.values():
            if run.info.status != "RUNNING":
                client.update_run(run.info.run_id, status="RUNNING")
        return runs

    def _adopt(self, client: MlflowClient) -> dict[str, Run] | None:
        """The run that Kubeflow made for this step, and its parent."""
        run = _adopted_run(client)
        if run is None:
            return None
        if TASK_TAG not in run.data.tags:
            client.set_tag(run.info.run_id, TASK_TAG, self.step)
        return {"step": run, "parent": _parent_of(client, run) or run}

    def _find_or_create(self, client: MlflowClient) -> dict[str, Run]:
        experiment_id = find_or_create_experiment(client, self.uri, self.experiment)
        parent = self._find_or_create_parent(client, experiment_id)
        parent_id = parent.info.run_id
        found = client.search_runs(
            [experiment_id],
            f"tags.`{PARENT_TAG}` = '{parent_id}' and tags.`{TASK_TAG}` = '{self.step}'",
            order_by=["attributes.start_time ASC"],
            max_results=1,
        )
        if found:
            return {"parent": parent, "step": found[0]}
        tags = {**_source_tags(self.step), PARENT_TAG: parent_id, TASK_TAG: self.step}
        return {"parent": parent, "step": client.create_run(experiment_id, tags=tags, run_name=self.step)}

    def _find_or_create_parent(self, client: MlflowClient, experiment_id: str) -> Run:
        """The parent run; MLflow cannot create one only if there is none, and steps may start at once.

        So a parent is taken for settled at a certain age only, when every competitor can be seen: then the oldest
        stays, and whoever made another one withdraws it.
        """
        parent = _find_parent(client, experiment_id, self.pipeline_run_id)
        created = None
        if parent is None:
            tags = {**_source_tags("skd pipeline"), PIPELINE_RUN_TAG: self.pipeline_run_id}
            name = self.run_name or f"skd-{self.pipeline_run_id[:12]}"
            parent = created = client.create_run(experiment_id, tags=tags, run_name=name)
        age = max(time.time() - parent.info.start_time / 1000, 0.0)
        if age < SETTLE_SECONDS:
            time.sleep(SETTLE_SECONDS - age)
            parent = _find_parent(client, experiment_id, self.pipeline_run_id) or parent
        if created is not None and created.info.run_id != parent.info.run_id:
            client.delete_run(created.info.run_id)
        return parent


def _find_parent(client: MlflowClient, experiment_id: str, pipeline_run_id: str) -> Run | None:
    runs = client.search_runs(
        [experiment_id], f"tags.`{PIPELINE_RUN_TAG}` = '{pipeline_run_id}'", order_by=["attributes.start_time ASC"]
    )
    parents = [run for run in runs if PARENT_TAG not in run.data.tags]  # Kubeflow's plugin may tag the nested ones too
    return min(parents, key=lambda run: (run.info.start_time, run.info.run_id), default=None)


def _adopted_run(client: MlflowClient) -> Run | None:
    """The run named in `MLFLOW_RUN_ID`; None if there is no such variable, or no such run in this store."""
    from mlflow.exceptions import MlflowException

    run_id = os.environ.get("MLFLOW_RUN_ID")
    if not run_id:
        return None
    try:
        return client.get_run(run_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        log.warning("MLFLOW_RUN_ID=%s is no run of this tracking store; the step gets a run of its own", run_id)
        return None


def _parent_of(client: MlflowClient, run: Run) -> Run | None:
    parent_id = run.data.tags.get(PARENT_TAG)
    return client.get_run(parent_id) if parent_id else None


def _source_tags(source: str) -> dict[str, str]:
    user = os.environ.get("USER")
    return {"mlflow.source.name": source, "skd.version": __version__, **({"mlflow.user": user} if user else {})}


@contextmanager
def _terminated_as_exit() -> Iterator[None]:
    """Let SIGTERM end the body as `SystemExit`, so that the run is closed; another handler is left in place."""
    here = threading.current_thread() is threading.main_thread()
    if not here or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    def leave(number: int, _frame: FrameType | None) -> None:
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
    return _clip(value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False), _PARAM_LENGTH)


def _clip(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 3] + "..."
