"""Step `preflight`: validate the configuration, check everything a run needs, and list all errors."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from skd_lib._core import events
from skd_lib._core.ascii_json import ascii_json
from skd_lib._core.machine import pipeline_run_id
from skd_lib._core.terminal import say, visible
from skd_lib.comparison import plan as comparisons
from skd_lib.config import GettextSource, RunConfig
from skd_lib.config.names import check_experiment, checked, run_name_from
from skd_lib.config.parameters import Form, changed_on_the_way, check_reference, from_parameters, short
from skd_lib.config.step import DEPENDS, OF_A_COMPARISON, OF_BOTH, step_config
from skd_lib.distillation.methods import METHODS
from skd_lib.errors import SkdError, SkdErrors
from skd_lib.steps.kfp_call import current_call
from skd_lib.steps.runtime import CheckpointRoot, Experiment, StepIO, Switch, TrackingUri, run_step
from skd_lib.storage import write_text_atomic

if TYPE_CHECKING:
    from skd_lib.comparison.plan import Plan
    from skd_lib.preflight import Check, PreflightReport

SHOWN = {
    "teacher": ("teacher",),
    "student": ("student",),
    "method": ("distill", "method"),
    "divergence": ("distill", "divergence"),
    "top_k": ("distill", "sampling", "top_k"),
    "gamma": ("distill", "sampling", "gamma"),
    "max_steps": ("distill", "training", "max_steps"),
    "learning_rate": ("distill", "training", "learning_rate"),
    "seed": ("seed",),
}
"""Parameter of a run in MLflow, to compare runs by -> its place in the configuration."""
NO_COMPARISON = "(a single run)"
"""Value of `--comparison` for a single run: no text that a person types. An empty one is a comparison's, cleared."""
MOST = 1500
"""Bytes of output parameter `problems`."""


def main(
    report_out: Annotated[Path, typer.Option(help="File for the report, in Markdown.")],
    run_name: Annotated[str, typer.Option(help="Name of the run where the configuration has none.")] = "",
    config: Annotated[
        str,
        typer.Option(
            help="Settings that differ from the defaults, as JSON, or the URI of a run's YAML file. Where another "
            "parameter is not empty, it decides."
        ),
    ] = "{}",
    comparison: Annotated[
        str,
        typer.Option(
            help='What is compared, as JSON (`{"methods": ["skd", "sft"], "seeds": [0, 1]}`), or the URI of a '
            "comparison's YAML file."
        ),
    ] = NO_COMPARISON,
    data_train: Annotated[
        str,
        typer.Option(
            help="Training data: paths, globs or URIs of files (JSONL, CSV, Parquet, ...), separated by commas. "
            "Empty: as `config` says."
        ),
    ] = "",
    data_validation: Annotated[
        str, typer.Option(help="Validation data, as `data_train`. Empty: cut from the training data.")
    ] = "",
    data_test: Annotated[str, typer.Option(help="Test data, as `data_train`. Empty: cut from the training data.")] = "",
    model_teacher: Annotated[
        str, typer.Option(help="Teacher: hub id (`google/gemma-7b-it`), mounted folder, gs:// or wheel:// URI.")
    ] = "",
    model_student: Annotated[
        str,
        typer.Option(
            help="Student, as `model_teacher`, with the teacher's tokenizer. Empty where it is cut from the teacher "
            "(`student_init.mode: prune` in `config`)."
        ),
    ] = "",
    task: Annotated[
        str,
        typer.Option(
            help="Task: `translation`, `summarization`, `gsm8k`, `math`, `instruction`, or the URI of a task's YAML "
            "file. Empty: as `config` says."
        ),
    ] = "",
    training_method: Annotated[
        str,
        typer.Option(
            help=f"Method of training: {', '.join(f'`{name}`' for name in METHODS)}. "
            "Empty: as `config` says, else `skd`."
        ),
    ] = "",
    training_steps: Annotated[int, typer.Option(help="Optimiser steps of each distillation. 0: as `config` says.")] = 0,
    mlflow_experiment: Annotated[str, typer.Option(help="MLflow experiment. Empty: the one of the settings.")] = "",
    reuse: Annotated[
        Switch,
        typer.Option(help="Take steps done before with the same data, models and settings from Kubeflow's cache."),
    ] = Switch.true,
    comet: Annotated[Switch, typer.Option(help="Whether the pipeline has a step for COMET.")] = Switch.true,
    pipeline_root: Annotated[
        str, typer.Option(help="Folder (local or gs://) for the pipeline's artifacts; empty: not looked at.")
    ] = "",
    require_gpu: Annotated[bool, typer.Option(help="Fail where no GPU is visible.")] = False,
    tracking_uri: TrackingUri = "",
    experiment: Experiment = "skd",
    checkpoint_root: CheckpointRoot = "",
) -> None:
    """Check models, tokenizers, data, storage, tracking and hardware in seconds, without loading any weights.

    On a cluster this step succeeds even when it finds errors: it passes them on as output parameter `problems`, and the
    next step fails with them. For KFP shows a step's artifacts, such as the report, only if the step succeeded.
    """
    from skd_lib._core.terminal import Console
    from skd_lib.preflight import run_checks
    from skd_lib.preflight.reuse import reuse_from
    from skd_lib.report.summary import headline_columns
    from skd_lib.tracking.runs import step_run

    io = StepIO({"findings": report_out})
    form = Form(
        config=config,
        data_train=data_train,
        data_validation=data_validation,
        data_test=data_test,
        model_teacher=model_teacher,
        model_student=model_student,
        task=task,
        training_method=training_method,
        training_steps=training_steps,
    )
    with _problems_for_the_next_step(io):
        fresh = "" if reuse else pipeline_run_id() or str(uuid.uuid4())
        try:
            run_config, plan = read(
                form, "" if comparison == NO_COMPARISON else comparison or "{}", run_name, mlflow_experiment
            )
            checked("--experiment", check_experiment, experiment)
        except SkdError as error:
            report = _refused(error, tracking_uri, mlflow_experiment or experiment)
            write_text_atomic(report_out, report.markdown())
            with step_run(
                step="preflight",
                tracking_uri=tracking_uri if report.tracking_works else "",
                experiment=mlflow_experiment or experiment,
                run_name=run_name_from(run_name),
            ) as run:
                run.log_artifact(report_out)
                report.raise_errors()
            raise
        run_config, columns = with_columns(run_config)
        report = run_checks(
            run_config,
            variants=[trial.config(run_config) for trial in plan.trials] if plan else (),
            checkpoint_root=checkpoint_root,
            tracking_uri=tracking_uri,
            experiment=mlflow_experiment or experiment,
            pipeline_root=pipeline_root or None,
            artifacts=current_call().uri(report_out),
            require_gpu=require_gpu,
            comet=bool(comet),
        )
        report.checks += [*columns, *([] if comet else without_comet(run_config, plan))]
        if not report.errors():
            preparation = step_config("prepare_data", run_config, fingerprint=report.data_fingerprint)
            kind: Literal["run", "comparison"] = "comparison" if plan else "run"
            fresh, noted = reuse_from(checkpoint_root, preparation, fresh, kind=kind)
            report.checks += noted
        if report.date:
            # From here on no step asks for today's date: all of them, and their repetitions, see the same prompts.
            dated = run_config.task.model_copy(update={"date": report.date})
            run_config = run_config.model_copy(update={"task": dated})
        for table in (report.table(), report.plan and report.plan.to_rich()):
            if table:
                Console().print(table)
        for check in report.checks:
            if check.level == "warning":
                events.emit("note", message=_on_one_line(check))  # the table shows it to those who read the log
        write_text_atomic(report_out, report.markdown())
        with step_run(
            step="preflight",
            # A store that has just not answered would only make the list of errors come later.
            tracking_uri=tracking_uri if report.tracking_works else "",
            experiment=mlflow_experiment or experiment,
            run_name=run_config.name,
            params=run_config.model_dump(mode="json"),
        ) as run:
            # What people compare runs by stands on the run itself, beside the headline figures that `report` adds.
            run.parent.log_params({name: _value(run_config, place) for name, place in SHOWN.items()})
            if not plan:
                run.parent.show_metrics(headline_columns(run_config.task.metrics))
            run.log_artifact(report_out)
            found = {
                "teacher": report.model_fingerprints.get(run_config.teacher, ""),
                "student": report.model_fingerprints.get(run_config.student or "", ""),
            }
            run.set_tags({"data_source_fingerprint": report.data_fingerprint})
            run.set_tags({f"{role}_fingerprint": print_ for role, print_ in found.items() if print_})
            report.raise_errors()
        prints = report.model_fingerprints
        values = settings_of(run_config, plan, data=report.data_fingerprint, models=prints, fresh=fresh)
        for name, value in {**values, "problems": ""}.items():
            io.parameter(name, value)
    io.write()


@contextmanager
def _problems_for_the_next_step(io: StepIO) -> Iterator[None]:
    """On a cluster, give the errors of a run to the next step instead of raising them."""
    from skd_lib.preflight.checks import Refused

    try:
        yield
    except Refused as refused:
        if not current_call().in_pod:
            raise
        say(f"error: {refused}", err=True)
        nothing = dict.fromkeys(current_call().parameters, "")
        for name, value in {**nothing, "trials": [], "problems": _problems(refused)}.items():
            io.parameter(name, value)


def _on_one_line(check: Check) -> str:
    return visible(SkdError(check.what, where=check.where or check.name, hint=check.hint).line)


def _problems(refused: SkdErrors) -> str:
    """Write the errors, a line each, short enough for a parameter."""
    lines = [error.brief for error in refused.errors]
    while len(text := ascii_json(lines)) > MOST and len(lines) > 1:
        lines = [*lines[:-2], "and more, see the report"]
    return text


def read(form: Form, comparison: str, run_name: str, mlflow_experiment: str = "") -> tuple[RunConfig, Plan | None]:
    """Return the configuration of a form, and its comparison if it has one; SkdErrors name all wrong fields."""
    errors: list[SkdError] = []
    plan = None
    if pipeline_run_id():
        errors += changed_on_the_way({**vars(form), "comparison": comparison}, ("config", "comparison"))
    try:
        if mlflow_experiment:
            checked("mlflow_experiment", check_experiment, mlflow_experiment)
    except SkdError as error:
        errors.append(error)
    try:
        if comparison:
            plan = comparisons.from_parameters(comparison, run_name=run_name, **vars(form))
            config = plan.base
        else:
            config = from_parameters(run_name=run_name, **vars(form))
        if os.environ.get("KUBERNETES_SERVICE_HOST"):
            check_reference(config.teacher, "model_teacher")
            for run in [trial.config(config) for trial in plan.trials] if plan else [config]:
                check_reference(run.student or "", "model_student")
    except SkdError as error:
        errors += error.errors if isinstance(error, SkdErrors) else [error]
    if errors:
        raise SkdErrors(errors)
    return config, plan


def with_columns(config: RunConfig) -> tuple[RunConfig, list[Check]]:
    """Name the data's columns, if they have usual names and the configuration gives none; a check says which."""
    from skd_lib.data.sources import find_columns
    from skd_lib.preflight import Check

    source = config.data.source
    if isinstance(source, GettextSource):
        return config, []
    columns = find_columns(source)
    if columns == source.columns:
        return config, []
    data = config.data.model_copy(update={"source": source.model_copy(update={"columns": columns})})
    what = f"{columns}: by their names, `data.source.columns` gives none"
    return config.model_copy(update={"data": data}), [Check("columns", "ok", what)]


def without_comet(config: RunConfig, plan: Plan | None) -> list[Check]:
    """Warn of the scores that a pipeline without a step for COMET leaves out."""
    from skd_lib.preflight import Check

    if not config.task.wants_comet:
        return []
    if plan:
        return [Check("comet", "warning", "comparisons have no scores by COMET", "task.metrics")]
    what, hint = (
        "this pipeline has no step for COMET",
        "start the pipeline's version with COMET (compiled/distillation_comet.yaml)",
    )
    if config.task.metrics[0] != "comet":
        return [Check("comet", "warning", what, "task.metrics", hint)]
    return [Check("comet", "error", f"{what}, which is to decide", "task.metrics", f"{hint}, or put another first")]


def _refused(error: SkdError, tracking_uri: str, experiment: str) -> PreflightReport:
    """Return the report of a run whose form cannot be read."""
    from skd_lib.preflight.checks import TRACKING, Checks, PreflightReport
    from skd_lib.preflight.environment import check_tracking_store

    checks = Checks()
    checks.failed("form", error)
    checks.attempt(TRACKING, lambda: check_tracking_store(checks, tracking_uri, experiment))
    return PreflightReport(checks.found)


def settings_of(
    config: RunConfig, plan: Plan | None, *, data: str, models: Mapping[str, str], fresh: str = ""
) -> dict[str, Any]:
    """Return the parameters of later steps, by name; empty for steps that a run of this kind does not have.

    `data` is the fingerprint of the data, `models` has those of the models by reference, `fresh` see `StepConfig`.
    """
    prints = {
        "prepare_data": data,
        "teacher_sft": models.get(config.teacher, ""),
        "evaluate_teacher": models.get(config.teacher, ""),
        "student_init": models.get(config.student or "", ""),
    }
    drafts = plan.compare.drafts if plan else True
    steps = {
        step: step_config(step, config, fingerprint=prints.get(step, ""), fresh=fresh, drafts=drafts)
        for step in DEPENDS
        if step in OF_BOTH or (step in OF_A_COMPARISON) == bool(plan)
    }
    return {
        **dict.fromkeys(DEPENDS, ""),
        **steps,
        "trials": [ascii_json(short(trial)) for trial in plan.trials] if plan else [],
        "model_fingerprints": ascii_json(dict(models)) if plan else "",
        "plan": ascii_json(plan.table()) if plan else "",
    }


def _value(config: RunConfig, place: tuple[str, ...]) -> Any:
    value: Any = config
    for name in place:
        value = getattr(value, name)
    return "" if value is None else value


if __name__ == "__main__":
    run_step(main)
