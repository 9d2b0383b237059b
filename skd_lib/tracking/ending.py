"""The end of a pipeline run, found from Kubeflow's word and from the MLflow runs of its steps.

KFP's word for the end, which its exit handler is given, is `COMPLETE`, `CACHED`, `FAILED`, `CANCELED` or `RUNNING` up
to 2.17, and `SUCCEEDED`, `SKIPPED`, `CACHED`, `FAILED` or `RUNNING` without MLMD. `RUNNING` says nothing: it comes when
a driver failed, when a pod was killed, when a person stopped the run, and after a success in which all steps of a
nested DAG were cached.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict

from skd_lib.tracking.client import TAG_LENGTH, clip
from skd_lib.tracking.locate import ERROR_TAG, PARENT_TAG, TASK_TAG, Record, RunLocation, children_of, find_parent

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

STATE_TAG = "skd.final_state"
"""Tag of a pipeline's parent run: an `Ending.state`."""
SUCCEEDED, FAILED, CANCELED, STOPPED = "SUCCEEDED", "FAILED", "CANCELED", "STOPPED"
_STATUS = {SUCCEEDED: "FINISHED", FAILED: "FAILED", CANCELED: "KILLED", STOPPED: "KILLED"}
SUCCESS = frozenset({"SUCCEEDED", "COMPLETE", "CACHED", "SKIPPED"})
CANCELLED = frozenset({"CANCELED", "CANCELLED", "CANCELING"})
_LAST_STEPS = ("register_model", "compare_table")
"""The last step of each pipeline; none is ever taken from the cache."""
OWN_STEP = "finish"


class Seen(BaseModel):
    """The answer of Kubeflow's API about a run.

    Attributes:
        known: Whether it has answered.
        cancelled: A person has stopped the run.
        steps: How all steps together have ended, `SUCCEEDED` or `FAILED`; empty if it does not say.
        failed: Tasks that failed, the first one first; `distill-driver` is Kubeflow's preparation of `distill`.
        told: One of them, and why it failed; empty up to KFP 2.17, which does not say.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    known: bool = False
    cancelled: bool = False
    steps: str = ""
    failed: list[str] = []
    told: str = ""


@dataclass(frozen=True)
class Ending:
    """The end of a pipeline run.

    Attributes:
        state: SUCCEEDED; FAILED; CANCELED by a person; STOPPED, by a person or by the machine's loss; empty if unknown.
        reason: The step that failed, and its error; empty after a success, and where nothing is known.
    """

    state: str
    reason: str = ""

    @property
    def status(self) -> str:
        """MLflow's word for it."""
        return _STATUS.get(self.state, "FAILED")


def find_ending(word: str, message: str, seen: Seen, runs: Sequence[Run] | None) -> Ending:
    """Decide how a pipeline run ended, from KFP's final state and message, its API, and the MLflow runs, oldest first.

    Without tracking there are no `runs`.
    """
    if word in SUCCESS:
        return Ending(SUCCEEDED)
    if word in CANCELLED or seen.cancelled:
        return Ending(CANCELED, message)
    steps = [run for run in runs or () if TASK_TAG in run.data.tags]
    reason = message if runs is None else _recorded_error(steps) or message or _killed_step(steps, seen)
    reason = reason or _by_tasks(seen) or _never_logged(runs or ())
    if seen.steps == FAILED:
        return Ending(FAILED, reason)
    # The last step needs all the others. Up to KFP 2.16.1 the word is FAILED where a step's first attempt failed only.
    if seen.steps == SUCCEEDED or any(
        run.info.status == "FINISHED" and run.data.tags[TASK_TAG] in _LAST_STEPS for run in steps
    ):
        return Ending(SUCCEEDED)
    if word == "FAILED":
        return Ending(FAILED, reason)
    if not seen.known and _recorded_error(steps) == "" and any(run.info.status == "KILLED" for run in steps):
        return Ending(STOPPED, reason)
    if reason:
        return Ending(FAILED, reason)
    if runs is not None:
        return Ending(FAILED, "a step did not start: Kubeflow's part of it (its driver) failed; see the run's page")
    return Ending("")


def _recorded_error(steps: Sequence[Run]) -> str:
    """Return the step that failed first, and its error."""
    found = (run for run in steps if run.info.status == "FAILED" and ERROR_TAG in run.data.tags)
    return next((f"{run.data.tags[TASK_TAG]}: {run.data.tags[ERROR_TAG]}" for run in found), "")


def _killed_step(steps: Sequence[Run], seen: Seen) -> str:
    """Return the first step that ended without recording an error, and the usual cause."""
    person = "" if seen.known else ", or stopped by a person"
    words = {
        "FAILED": "no reason is recorded; see its log",
        "RUNNING": f"its process was killed (out of memory, eviction, pre-emption{person})",
        "KILLED": f"it was stopped (eviction, pre-emption, the end of its time{person})",
    }
    found = (run for run in steps if run.info.status in words)
    return next((f"{run.data.tags[TASK_TAG]}: {words[run.info.status]}" for run in found), "")


def _by_tasks(seen: Seen) -> str:
    """Return the task that failed first, of those that Kubeflow's API lists."""
    if seen.told:
        return seen.told
    for task in seen.failed:
        step = task.removesuffix("-driver")
        if step != task:
            return f"{step}: Kubeflow could not start it; the reason is in the log of the pod of {task}"
        return f"{task}: it failed; the reason is in its log"
    return ""


def _never_logged(runs: Sequence[Run]) -> str:
    """Return a step of which only Kubeflow's plugin has made a run, and which did not end."""
    above = {run.data.tags.get(PARENT_TAG) for run in runs}
    for run in runs:
        open_or_failed = run.info.status in ("RUNNING", "FAILED")
        if open_or_failed and run.info.run_id not in above and TASK_TAG not in run.data.tags:
            return f"{run.info.run_name}: it failed, or could not start; the reason is in its log"
    return ""


class PipelineClosing(Record):
    """The end of a whole pipeline run; see `runs.close_pipeline_run`."""

    kind: Literal["pipeline_closing"] = "pipeline_closing"
    state: str
    error: str
    seen: Seen = Seen()

    def close(self, client: MlflowClient, location: RunLocation) -> bool:
        """Close the parent run and those below it that are still open; tell whether there was one."""
        parent = find_parent(client, location)
        if parent is None:
            return False
        runs = [run for run in children_of(client, parent) if not _is_own(run, location)]
        ending = find_ending(self.state, self.error, self.seen, runs)
        for run in runs:
            if run.info.status == "RUNNING":
                client.set_terminated(run.info.run_id, ending.status)
        for tag, value in ((STATE_TAG, ending.state), (ERROR_TAG, ending.reason)):
            if value:
                client.set_tag(parent.info.run_id, tag, clip(value, TAG_LENGTH))
            elif tag in parent.data.tags:
                client.delete_tag(parent.info.run_id, tag)  # of an attempt before this one
        client.set_terminated(parent.info.run_id, ending.status, self.at)
        return True


def _is_own(run: Run, location: RunLocation) -> bool:
    """Tell whether a run is that of the step that closes the others."""
    return bool(run.info.run_name == OWN_STEP or run.info.run_id == location.mlflow_run_id)
