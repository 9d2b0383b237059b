"""Step `evaluate_teacher`: the teacher before and after fine-tuning, evaluated one after the other."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from skd_lib.config import parse_section
from skd_lib.config.step import STEP_HELP, StepConfig
from skd_lib.errors import SkdError
from skd_lib.steps.evaluate import DATA_HELP, Role, evaluate_models, evaluation_params
from skd_lib.steps.runtime import Experiment, StepIO, TrackingUri, present, run_step


def main(
    teacher: Annotated[Path, typer.Option(help="Folder of the fine-tuned teacher, in Hugging Face layout.")],
    data: Annotated[Path, typer.Option(help=DATA_HELP)],
    evaluations_out: Annotated[Path, typer.Option(help="Folder for both, each under the name of its role.")],
    config: Annotated[str, typer.Option(help=f"{STEP_HELP}; its `teacher` names the teacher before fine-tuning")],
    tracking_uri: TrackingUri = "",
    experiment: Experiment = "skd",
) -> None:
    """Evaluate the teacher before and after fine-tuning, as step `evaluate` does for one model.

    The teacher before fine-tuning is fetched once more: as an artifact it would be kept, and handed from step to step,
    for this step alone. It is measured where it is; sampling defaults that come with it have no say.
    """
    from skd_lib.models.files import served_in
    from skd_lib.models.importing import check_whole, fetch_model, origin_of
    from skd_lib.models.references import check_unchanged
    from skd_lib.tracking.runs import step_run

    io = StepIO({"evaluations": evaluations_out})
    settings = parse_section(StepConfig, config, where="--config")
    if not settings.teacher:
        hint = 'e.g. {"teacher": "google/gemma-7b-it"}'
        raise SkdError("the teacher before fine-tuning is not named", where="--config, field `teacher`", hint=hint)
    present("teacher", teacher)
    present("data", data)
    with step_run(
        step="evaluate_teacher",
        tracking_uri=tracking_uri,
        experiment=experiment,
        params={"teacher": settings.teacher, **evaluation_params(settings)},
    ) as run:
        if served_in(teacher):  # there is one teacher, as it is on the server
            base, origins = teacher, {}
        else:
            base, fingerprint = fetch_model(settings.teacher, settings.fingerprint, code=settings.trust_remote_code)
            check_whole(base)
            origins = {Role.teacher_base: origin_of(settings.teacher, base, fingerprint)}
        evaluate_models(
            {Role.teacher_base: base, Role.teacher: teacher},
            data,
            evaluations_out,
            settings,
            run,
            data_uri=io.input_uri("data", data),
            uris={Role.teacher_base: settings.teacher, Role.teacher: io.input_uri("teacher", teacher)},
            origins=origins,
        )
        if origins:
            check_unchanged(settings.teacher, fingerprint)  # nor while it was measured
    io.write()


if __name__ == "__main__":
    run_step(main)
