"""`skd run`: run the whole pipeline on this machine."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from skd_kfp.pipelines.cli.inputs import check_inputs, check_places, model_errors, raise_any, read_data
from skd_kfp.pipelines.cli.options import CometImage, Image, Local, Set, refuse, say_json, short
from skd_lib._core.terminal import say
from skd_lib._core.uris import shown, sqlite_file
from skd_lib.errors import SkdError

if TYPE_CHECKING:
    from skd_kfp.pipelines.local.containers import Containers
    from skd_kfp.pipelines.local.folder import RunFolder
    from skd_kfp.pipelines.local.runner import LocalRun
    from skd_lib._core.terminal import Console
    from skd_lib.config import RunConfig


def run(
    context: typer.Context,
    config: Annotated[Path, typer.Argument(help="The run's YAML file, e.g. pipelines/configs/demo.yaml.")],
    local: Local,
    changes: Set = None,
    docker: Annotated[
        bool,
        typer.Option(
            "--docker", help="Run each step in its image; without network where models, data and MLflow are local."
        ),
    ] = False,
    image: Image = None,
    comet_image: CometImage = None,
    as_json: Annotated[bool, typer.Option("--json", help="With --dry-run: print the plan as JSON.")] = False,
) -> None:
    """Run the whole pipeline on this machine.

    The steps are those of the cluster, as child processes or, with --docker, as containers. Running again reuses
    finished steps whose inputs have not changed, and resumes training from its last checkpoint.

    Examples: `skd run run.yaml --dry-run`, `skd run run.yaml --set distill.sampling.top_k=5`.
    """
    from skd_lib._core.terminal import Console
    from skd_lib.config import load_config, parse_overrides, refuse_multinode

    local.check()
    settings = load_config(config, parse_overrides(changes or ()))
    refuse_multinode(settings, where=str(config))
    if not docker:
        refuse(context, "image", "comet_image", why="without --docker steps are processes, not containers")
    elif not settings.task.wants_comet:
        refuse(context, "comet_image", why="the run's `task.metrics` do not name COMET")
    console = Console(file=sys.stdout)  # this very stream: kfp's own output is redirected from `sys.stdout`
    if as_json and not local.dry_run:
        hint = "add --dry-run; `skd report NAME --json` prints the figures of a finished run"
        raise SkdError("it prints the plan of a dry run", where="--json", hint=hint)
    if local.dry_run:
        print_plan(console, settings, local, as_json=as_json)
    else:
        run_here(console, settings, local, docker=docker, image=image, comet_image=comet_image)


def run_here(
    console: Console,
    settings: RunConfig,
    local: Local,
    *,
    docker: bool = False,
    image: str | None = None,
    comet_image: str | None = None,
) -> None:
    """Run the pipeline on this machine, and print the table, the places of the results and the next command.

    Raises:
        SkdError: data or models are not there, before a step starts; or a step failed.
    """
    from skd_kfp.pipelines.local.stopping import explain_end, same_command

    check_places(settings)

    with explain_end(same_command()):
        from skd_kfp.pipelines.compiling import compile_pipeline, pipeline_for
        from skd_kfp.pipelines.graph import read_steps
        from skd_kfp.pipelines.local.folder import RunFolder
        from skd_kfp.pipelines.local.progress import display_for
        from skd_kfp.pipelines.local.runner import run_pipeline

        documents = compile_pipeline(image, comet_image, name=pipeline_for(settings))
        steps = len(read_steps(documents[0]))
        folder = RunFolder.create(local.runs_dir, settings.name)
        containers = _containers(settings, folder, image, comet_image, local.store) if docker else None
        files = f"files in {short(folder.root)}, MLflow {shown(local.store) or 'off'}"
        say(f"run {settings.name}: {steps} steps, {files}")
        finished = run_pipeline(
            settings,
            folder,
            documents,
            display_for(console, settings.name, steps),
            tracking_uri=local.store,
            experiment=local.experiment,
            fresh=local.fresh,
            containers=containers,
        )
        _conclude(console, finished, folder, local.store, local.experiment)


def _containers(
    config: RunConfig, folder: RunFolder, image: str | None, comet_image: str | None, tracking_uri: str
) -> Containers:
    """Return what runs the steps in their images."""
    from skd_kfp.components.images import COMET, TRAIN
    from skd_kfp.pipelines.local.containers import Containers, connect, find_image, inputs_of

    client = connect()
    needed = [image or TRAIN, *([comet_image or COMET] if config.task.wants_comet else [])]
    database = sqlite_file(tracking_uri)
    return Containers(
        client,
        {name: find_image(client, name) for name in needed},
        folder.root,
        inputs_of(config, tracking_uri),
        () if database is None else (database.absolute().parent,),
    )


def print_plan(console: Console, config: RunConfig, local: Local, *, as_json: bool = False) -> None:
    """Print the steps of a run, what it reads, where its results would be; then raise what is seen to be wrong."""
    from rich.table import Table

    from skd_kfp.pipelines.compiling import compile_pipeline, pipeline_for
    from skd_kfp.pipelines.graph import read_steps

    steps = read_steps(compile_pipeline(name=pipeline_for(config))[0])
    places = {"files": str(local.runs_dir / config.name), "MLflow": shown(local.store) or "off"}
    if as_json:
        listed = [
            {"name": step.name, "command": step.command, "after": list(step.waits_for), "at_the_end": step.is_exit}
            for step in steps
        ]
        plan = {"config": config.model_dump(mode="json"), "steps": listed}
        say_json({**plan, **{name.lower(): place for name, place in places.items()}})
        check_inputs(config)
        return
    table = Table("step", "after", title=f"run {config.name}", title_justify="left", box=None)
    for step in steps:
        after = "everything" if step.is_exit else ", ".join(step.waits_for) or "-"
        table.add_row(step.name, after)
    console.print(table)
    student = config.student or f"cut from the teacher ({config.student_init.mode})"
    data, errors = read_data(config)
    for name, value in {
        "teacher": config.teacher,
        "student": student,
        "method": f"{config.distill.method}, {config.distill.divergence}",
        **data,
        "registry": _registration(config, local.store),
        **places,
    }.items():
        say(f"{name:<8} {value}")
    raise_any([*errors, *model_errors([config])])


def _registration(config: RunConfig, tracking_uri: str) -> str:
    """Return what the run registers, and under which name."""
    from skd_lib.config import RegistryConfig

    if not tracking_uri:
        return "off: without MLflow no model is registered"
    name = config.registry.model_name
    shared = " (the default name; `registry.model_name` is another)" if name == RegistryConfig().model_name else ""
    better = "better" if config.registry.gate == "score" else "the better draft"
    return f"the student becomes a version of {name}{shared}, and its champion if it is {better}"


def _conclude(console: Console, run: LocalRun, folder: RunFolder, tracking_uri: str, experiment: str) -> None:
    """Print the table, the places of the results, and the next command."""
    from skd_lib.config import parse_section
    from skd_lib.models.records import RECORD, SAMPLES, read_samples
    from skd_lib.report.page import write_page
    from skd_lib.report.render import render
    from skd_lib.report.summary import Summary
    from skd_lib.tracking.view import where_to_look

    figures = Path(run.outputs["report"]["figures"])
    summary = parse_section(Summary, figures.read_text(encoding="utf-8"), where=str(figures))
    summary = summary.with_seconds(run.durations())
    summary.write(folder.summary)
    samples = Path(run.outputs["distill"]["distilled_student"]) / RECORD / SAMPLES
    shutil.copyfile(samples, folder.root / SAMPLES)
    write_page(folder.page, summary, read_samples(samples))
    console.print()
    console.print(render(summary))
    console.print()
    models = {
        "student": run.outputs["distill"]["distilled_student"],
        "teacher": run.outputs["teacher_sft"]["tuned_teacher"],
    }
    links = {name: folder.link(name, Path(uri)) for name, uri in models.items()}
    for name, path in {"report": folder.page, "summary": folder.summary, **links, "logs": folder.logs}.items():
        say(f"{name:<8} {short(path)}")
    if tracking_uri:
        for what, line in where_to_look(tracking_uri, experiment).items():
            say(f"{what:<8} {line}")
    if run.outcome:
        say(run.outcome)
