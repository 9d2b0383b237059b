"""Step `evaluate_both`: a model before and after training, evaluated one after the other."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from skd_lib.steps.evaluate import Request, Role, evaluate_model
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
    config: Annotated[str, typer.Option(help="Section `evaluation` of the run's config, as JSON.")] = "{}",
    task_config: Annotated[str, typer.Option(help="Section `task` of the run's config, as JSON.")] = "{}",
    seed: Annotated[int, typer.Option(min=0, help="Seed of the bootstrap; decoding is greedy.")] = 0,
    tracking_uri: TrackingUri = "",
    experiment: Experiment = "skd",
) -> None:
    """Evaluate a model before and after training, as step `evaluate` does for one.

    Two models in one step: each step takes some 30 kB in Kubeflow's records of a run, whose size is limited
    (`pipelines.sizes`).
    """
    from skd_lib.tracking.runs import step_run

    io = StepIO({"evaluations": evaluations_out})
    request = Request.parse(config, task_config, seed)
    models = dict(zip(pair.roles, (before, after), strict=True))
    for name, folder in {"before": before, "after": after}.items():
        present(name, folder)
    uri = io.input_uri("data", data)
    step = f"evaluate_both-{pair.value}"
    with step_run(step=step, tracking_uri=tracking_uri, experiment=experiment, params=request.params()) as run:
        for role, model in models.items():
            folder, prefix = evaluations_out / role.value, f"{role.value}."
            evaluate_model(model, data, role, folder, request, run, data_uri=uri, prefix=prefix)
    io.write()


if __name__ == "__main__":
    run_step(main)
