"""Step `evaluate_both`: a model before and after training, evaluated one after the other."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from skd_lib.config import parse_section
from skd_lib.config.step import STEP_HELP, StepConfig
from skd_lib.steps.evaluate import Role, evaluate_model, evaluation_params
from skd_lib.steps.inputs import present
from skd_lib.steps.options import Experiment, TrackingUri
from skd_lib.steps.runtime import StepIO, run_step


class Pair(StrEnum):
    """Which of the run's models is evaluated before and after."""

    teacher = "teacher"
    student = "student"

    @property
    def roles(self) -> tuple[Role, Role]:
        """Before, and after."""
        if self is Pair.teacher:
            return Role.teacher_base, Role.teacher
        return Role.student_before, Role.student_after


def main(
    before: Annotated[Path, typer.Option(help="Folder of the model before training, in Hugging Face layout.")],
    after: Annotated[Path, typer.Option(help="Folder of the model after training.")],
    data: Annotated[
        Path, typer.Option(help="Folder that `prepare_data` wrote; its test split and held-out sets are used.")
    ],
    pair: Annotated[Pair, typer.Option(help="Which of the run's models it is; names the results.")],
    evaluations_out: Annotated[Path, typer.Option(help="Folder for both, each under the name of its role.")],
    config: Annotated[str, typer.Option(help=STEP_HELP)] = "{}",
    tracking_uri: TrackingUri = "",
    experiment: Experiment = "skd",
) -> None:
    """Evaluate a model before and after training, as step `evaluate` does for one.

    Two models in one step: each step takes some 30 kB in Kubeflow's records of a run, whose size is limited
    (`pipelines.sizes`).
    """
    from skd_lib.tracking.runs import step_run

    io = StepIO({"evaluations": evaluations_out})
    settings = parse_section(StepConfig, config, where="--config")
    models = dict(zip(pair.roles, (before, after), strict=True))
    for name, folder in {"before": before, "after": after}.items():
        present(name, folder)
    uri = io.input_uri("data", data)
    step, params = f"evaluate_both-{pair.value}", evaluation_params(settings)
    with step_run(step=step, tracking_uri=tracking_uri, experiment=experiment, params=params) as run:
        for role, model in models.items():
            folder, prefix = evaluations_out / role.value, f"{role.value}."
            evaluate_model(model, data, role, folder, settings, run, data_uri=uri, prefix=prefix)
    io.write()


if __name__ == "__main__":
    run_step(main)
