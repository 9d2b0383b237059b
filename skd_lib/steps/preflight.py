"""Step `preflight`: validate the configuration, look at everything a run needs, and list all that is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from skd_lib.compare.trials import parse_trials
from skd_lib.config.names import check_experiment, checked
from skd_lib.parameters import PLACES, from_parameters, to_parameters, to_struct
from skd_lib.steps.runtime import EXECUTOR_INPUT_HELP, StepIO, run_step
from skd_lib.storage import write_text_atomic

SECTIONS = ("data", "task", "teacher_sft", "student_init", "distill", "evaluation", "specdec", "registry")


def main(
    config: Annotated[
        str,
        typer.Option(
            help="The run's configuration, as JSON; the options named after its fields go before what it says."
        ),
    ],
    checkpoint_root: Annotated[
        str, typer.Option(help="Folder or gs:// URI for the checkpoints of training steps; it must be writable.")
    ],
    report_out: Annotated[Path, typer.Option(help="File for the report, in Markdown.")],
    pipeline_root: Annotated[
        str, typer.Option(help="Folder (local or gs://) for the pipeline's artifacts; empty: not looked at.")
    ] = "",
    trials: Annotated[
        str, typer.Option(help="Runs of a comparison: a JSON list of what differs in each; empty list: none.")
    ] = "[]",
    require_gpu: Annotated[bool, typer.Option(help="Fail where no GPU is visible.")] = False,
    run_name: Annotated[str | None, typer.Option(help="Field `name`.")] = None,
    teacher: Annotated[str | None, typer.Option(help="Field `teacher`.")] = None,
    student: Annotated[str | None, typer.Option(help="Field `student`; empty unsets it.")] = None,
    method: Annotated[str | None, typer.Option(help="Field `distill.method`.")] = None,
    divergence: Annotated[str | None, typer.Option(help="Field `distill.divergence`.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Field `distill.sampling.top_k`; -1: as in --config.")] = None,
    gamma: Annotated[int | None, typer.Option(help="Field `distill.sampling.gamma`; -1: as in --config.")] = None,
    max_steps: Annotated[int | None, typer.Option(help="Field `distill.training.max_steps`; 0 unsets it.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Field `distill.training.learning_rate`.")] = None,
    seed: Annotated[int | None, typer.Option(help="Field `seed`.")] = None,
    tracking_uri: Annotated[str, typer.Option(help="MLflow tracking URI; empty turns tracking off.")] = "",
    experiment: Annotated[str, typer.Option(help="MLflow experiment.")] = "skd",
    executor_input: Annotated[str | None, typer.Option(help=EXECUTOR_INPUT_HELP)] = None,
) -> None:
    """Check models, tokenizers, data, storage, tracking and hardware in seconds, without loading any weights."""
    from skd_lib.console import Console
    from skd_lib.preflight import run_checks
    from skd_lib.tracking.runs import step_run

    checked("--experiment", check_experiment, experiment)
    io = StepIO(executor_input, {"report": report_out})
    run_config = from_parameters(
        config,
        where="--config",
        run_name=run_name,
        teacher=teacher,
        student=student,
        method=method,
        divergence=divergence,
        top_k=top_k,
        gamma=gamma,
        max_steps=max_steps,
        learning_rate=learning_rate,
        seed=seed,
    )
    report = run_checks(
        run_config,
        variants=[trial.config(run_config) for trial in parse_trials(trials, where="--trials")],
        checkpoint_root=checkpoint_root,
        tracking_uri=tracking_uri,
        experiment=experiment,
        pipeline_root=pipeline_root or None,
        require_gpu=require_gpu,
    )
    if report.date:
        # From here on no step asks for today's date: all of them, and their repetitions, see the same prompts.
        dated = run_config.task.model_copy(update={"date": report.date})
        run_config = run_config.model_copy(update={"task": dated})
    Console().print(report.table())
    write_text_atomic(report_out, report.markdown())
    with step_run(
        step="preflight",
        # A store that has just not answered would only make the list of errors come later.
        tracking_uri=tracking_uri if report.tracking_works else "",
        experiment=experiment,
        run_name=run_config.name,
        params=run_config.model_dump(mode="json"),
    ) as run:
        # What people compare runs by stands on the run itself, beside the headline figures that `report` adds.
        parameters = to_parameters(run_config)
        run.parent.log_params({name: parameters[name] for name in PLACES})
        run.log_artifact(report_out)
        prints = {
            "teacher": report.model_fingerprints.get(run_config.teacher, ""),
            "student": report.model_fingerprints.get(run_config.student or "", ""),
        }
        run.set_tags({"data_source_fingerprint": report.data_fingerprint})
        run.set_tags({f"{role}_fingerprint": found for role, found in prints.items() if found})
        report.raise_errors()
    sections = {name: to_struct(getattr(run_config, name)) for name in SECTIONS}
    # COMET's settings go to its own step alone: if one changes, the models need not answer again.
    sections["comet"] = dict(sections["evaluation"])
    del sections["evaluation"]["comet"]
    for name, values in sections.items():
        io.parameter(f"{name}_config", values)
    io.parameter("run_config", to_struct(run_config))
    io.parameter("comet_wanted", "true" if run_config.task.wants_comet else "false")
    io.parameter("data_fingerprint", report.data_fingerprint)
    for role, found in prints.items():
        io.parameter(f"{role}_fingerprint", found)
    io.parameter("model_fingerprints", report.model_fingerprints)
    io.parameter("trust_remote_code", run_config.trust_remote_code)
    io.write()


if __name__ == "__main__":
    run_step(main)
