"""Step `evaluate_student`: the student before and after distillation, evaluated one after the other."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from skd_lib.config import parse_section
from skd_lib.config.step import STEP_HELP, StepConfig
from skd_lib.steps.evaluate import DATA_HELP, Role, evaluate_models, evaluation_params
from skd_lib.steps.runtime import Experiment, StepIO, TrackingUri, present, run_step


def main(
    before: Annotated[Path, typer.Option(help="Folder of the student before distillation, in Hugging Face layout.")],
    after: Annotated[Path, typer.Option(help="Folder of the student after distillation.")],
    data: Annotated[Path, typer.Option(help=DATA_HELP)],
    evaluations_out: Annotated[Path, typer.Option(help="Folder for both, each under the name of its role.")],
    config: Annotated[str, typer.Option(help=STEP_HELP)] = "{}",
    tracking_uri: TrackingUri = "",
    experiment: Experiment = "skd",
) -> None:
    """Evaluate the student before and after distillation, as step `evaluate` does for one model.

    Two models in one step: each step takes some 30 kB in Kubeflow's records of a run, whose size is limited
    (`skd_kfp.pipelines.kubeflow.sizes`). If training has changed nothing, the model is measured once.
    """
    from skd_lib.tracking.runs import step_run

    io = StepIO({"evaluations": evaluations_out})
    settings = parse_section(StepConfig, config, where="--config")
    for name, folder in {"before": before, "after": after}.items():
        present(name, folder)
    models = {Role.student_before: before, Role.student_after: after}
    with step_run(
        step="evaluate_student",
        tracking_uri=tracking_uri,
        experiment=experiment,
        params=evaluation_params(settings),
    ) as run:
        uris = {role: io.input_uri(role.removeprefix("student_"), folder) for role, folder in models.items()}
        evaluate_models(models, data, evaluations_out, settings, run, data_uri=io.input_uri("data", data), uris=uris)
    io.write()


if __name__ == "__main__":
    run_step(main)
