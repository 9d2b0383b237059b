"""Step `finish`: close the run's records, whether the pipeline succeeded or failed."""

from __future__ import annotations

import os
from typing import Annotated

import typer
from pydantic import ConfigDict

from skd_lib.config import Section, parse_section
from skd_lib.errors import SkdError
from skd_lib.steps.runtime import EXECUTOR_INPUT_HELP, StepIO, run_step


class StatusError(Section):
    """Why a pipeline failed, as KFP tells it."""

    model_config = ConfigDict(extra="ignore")

    code: int = 0
    message: str = ""


class FinalStatus(Section):
    """The part of KFP's `PipelineTaskFinalStatus` that matters here."""

    model_config = ConfigDict(extra="ignore")

    state: str
    error: StatusError | None = None


def main(
    status: Annotated[str, typer.Option(help='KFP\'s final status, as JSON: {"state": "SUCCEEDED", "error": {...}}.')],
    tracking_uri: Annotated[str, typer.Option(help="MLflow tracking URI; empty: no tracking.")] = "",
    experiment: Annotated[str, typer.Option(help="MLflow experiment.")] = "skd",
    executor_input: Annotated[str | None, typer.Option(help=EXECUTOR_INPUT_HELP)] = None,
) -> None:
    """Give the pipeline's MLflow run its final status, and close the steps' runs that died without a word.

    The pipeline run is the one of the environment variable `KFP_RUN_ID`.
    """
    from skd_lib.tracking.runs import close_pipeline_run

    final = parse_section(FinalStatus, status, where="--status")
    if tracking_uri:
        pipeline_run_id = os.environ.get("KFP_RUN_ID")
        if not pipeline_run_id:
            raise SkdError(
                "which pipeline run is to be closed is not known",
                where="environment variable `KFP_RUN_ID`",
                hint="set it to the run's id; the pipeline does so itself",
            )
        closed = close_pipeline_run(
            tracking_uri=tracking_uri,
            experiment=experiment,
            pipeline_run_id=pipeline_run_id,
            state=final.state,
            error=final.error.message if final.error else "",
        )
        print(f"pipeline run {pipeline_run_id}: {final.state}{'' if closed else ' (no MLflow run to close)'}")
    StepIO(executor_input, {}).write()


if __name__ == "__main__":
    run_step(main)
