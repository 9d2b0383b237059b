"""Step `finish`: clean up, close the run's records, whether the pipeline succeeded or failed, and notify."""

from __future__ import annotations

import logging
import os
import shlex
from typing import Annotated

import typer
from pydantic import ConfigDict

from skd_lib._core import events
from skd_lib._core.machine import pipeline_run_id
from skd_lib.config import Section, parse_section
from skd_lib.errors import SkdError
from skd_lib.steps.runtime import Experiment, TrackingUri, run_step
from skd_lib.tracking.ending import SUCCESS, Seen, find_ending

log = logging.getLogger(__name__)
UI_VARIABLE = "KF_PIPELINES_UI_ENDPOINT"
"""Address of Kubeflow's page, as browsers see it."""


class StatusError(Section):
    """The reason of a failed pipeline, in KFP's words."""

    model_config = ConfigDict(extra="ignore")

    code: int = 0
    message: str = ""


class FinalStatus(Section):
    """The part of KFP's `PipelineTaskFinalStatus` that this step reads."""

    model_config = ConfigDict(extra="ignore")

    state: str
    error: StatusError | None = None

    @property
    def message(self) -> str:
        """KFP's error, if it has one."""
        return self.error.message if self.error else ""


def main(
    status: Annotated[str, typer.Option(help='KFP\'s final status, as JSON: {"state": "COMPLETE", "error": {...}}.')],
    run_name: Annotated[str, typer.Option(help="Name of the run, for the message.")] = "",
    tracking_uri: TrackingUri = "",
    experiment: Experiment = "skd",
) -> None:
    """Give the pipeline's MLflow run its final status, and close the runs of steps that were killed.

    Where KFP does not say how the run ended (`RUNNING` is a regular word at the end), the runs of its steps do, and
    Kubeflow's API, where it answers: whether a person stopped the run, and which task failed. The pipeline run is the
    one of the environment variable `KFP_RUN_ID`. Before that, in a cluster, delete its TrainJobs that go on although
    the steps that made them are dead, and send what MLflow did not take while it was down, as far as
    `SKD_TRACKING_BUFFER` holds it. In the end tell a chat channel, if `SKD_NOTIFY_WEBHOOK` holds the URL of its
    incoming webhook (Slack's kind); `KF_PIPELINES_UI_ENDPOINT`, the address of Kubeflow's page, makes the message link
    to the run.
    """
    final = parse_section(FinalStatus, status, where="--status")
    run_id = pipeline_run_id()
    _clean_up(run_id)
    _resend(tracking_uri, run_id)
    seen = _ask_kubeflow(final, run_id)
    try:
        close_run(final, seen, tracking_uri, experiment, run_id)
    finally:
        _tell(final, seen, run_name, tracking_uri, experiment, run_id)


def _ask_kubeflow(final: FinalStatus, run_id: str) -> Seen:
    """Ask Kubeflow's API for the end of the run, unless it has succeeded. No error stops the step."""
    if final.state in SUCCESS:
        return Seen()
    from skd_lib.steps import kubeflow

    return kubeflow.ask(run_id)


def _clean_up(run_id: str) -> None:
    """Delete the TrainJobs and vLLM servers of dead steps. No error stops the step, or the other of the two."""
    from skd_lib.multinode import cleanup

    for what, delete in (
        ("TrainJobs", cleanup.delete_abandoned),
        ("vLLM servers", cleanup.delete_abandoned_servers),
    ):
        try:
            names = delete(run_id)
        except Exception:
            log.exception("%s of this run may go on; see docs/guides/multi-node.md", what)
            continue
        if names:
            print(f"{what} without a step, deleted: {', '.join(names)}")


def _resend(tracking_uri: str, run_id: str) -> None:
    """Send MLflow the records that it did not take when the run's steps ended. No error stops the step."""
    if not (tracking_uri and run_id):
        return
    from skd_lib.tracking.outbox import left_in, resend

    try:
        left = resend(left_in(), tracking_uri, run_id)
    except SkdError as error:
        log.warning("what steps left for MLflow cannot be looked for: %s", error.brief)
        return
    if left:
        events.note(f"MLflow has not taken the records of all steps: run `skd track replay {shlex.join(left)}`")


def close_run(final: FinalStatus, seen: Seen, tracking_uri: str, experiment: str, run_id: str) -> None:
    """Give the pipeline's MLflow run its final status."""
    from skd_lib.tracking.runs import close_pipeline_run

    if not tracking_uri:
        return
    if not run_id:
        raise SkdError(
            "which pipeline run is to be closed is not known",
            where="environment variable `KFP_RUN_ID`",
            hint="set it to the run's id; the pipeline does so itself",
        )
    closed = close_pipeline_run(
        tracking_uri=tracking_uri,
        experiment=experiment,
        pipeline_run_id=run_id,
        state=final.state,
        error=final.message,
        seen=seen,
    )
    if not closed:
        print(f"pipeline run {run_id}: no MLflow run to close")


def _tell(final: FinalStatus, seen: Seen, run_name: str, tracking_uri: str, experiment: str, run_id: str) -> None:
    """Print how the run ended, and notify a channel; an unreadable record leaves the message without its figures."""
    from skd_lib.steps.notify import Message, notify
    from skd_lib.tracking.runs import PipelineRecord, pipeline_record

    record = PipelineRecord()
    try:
        record = pipeline_record(tracking_uri=tracking_uri, experiment=experiment, pipeline_run_id=run_id)
    except SkdError as error:
        log.warning("the notification has no figures: %s", error.brief)
    page = os.environ.get(UI_VARIABLE, "").rstrip("/")
    links = {
        "Kubeflow": f"{page}/#/runs/details/{run_id}" if page and run_id else "",
        "MLflow": record.url,
        "all runs": record.table_url,
    }
    ending = find_ending(final.state, final.message, seen, None)
    message = Message(
        run_name or run_id or "a pipeline run",
        record.state or ending.state,
        record.error if record.state else ending.reason,
        {what: link for what, link in links.items() if link},
        record.figures,
    )
    print(message.head())
    if notify(message):
        print("the channel was notified")


if __name__ == "__main__":
    run_step(main)
