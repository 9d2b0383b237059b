"""`skd run`: run the whole pipeline on this machine."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from skd_kfp.pipelines.cli.options import CometImage, Image, Local, Set, refuse, say_json, short
from skd_lib._core.terminal import say
from skd_lib._core.uris import shown, sqlite_file
from skd_lib.errors import SkdError, SkdErrors

_COUNTED = 5_000
"""Rows of a file that a dry run reads, at most."""
_COMPARED = 100_000
"""Characters in which it looks for near duplicates."""

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
    """Run the pipeline on this machine, and print the table, the places of the results and the next command."""
    from skd_kfp.pipelines.local.stopping import explain_end, same_command

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
        _raise_any(_model_errors(config))
        return
    table = Table("step", "after", title=f"run {config.name}", title_justify="left", box=None)
    for step in steps:
        after = "everything" if step.is_exit else ", ".join(step.waits_for) or "-"
        table.add_row(step.name, after)
    console.print(table)
    student = config.student or f"cut from the teacher ({config.student_init.mode})"
    data, errors = _data(config)
    for name, value in {
        "teacher": config.teacher,
        "student": student,
        "method": f"{config.distill.method}, {config.distill.divergence}",
        **data,
        "registry": _registration(config, local.store),
        **places,
    }.items():
        say(f"{name:<8} {value}")
    _raise_any([*errors, *_model_errors(config)])


def _raise_any(errors: list[SkdError]) -> None:
    if errors:
        raise errors[0] if len(errors) == 1 else SkdErrors(errors)


def _model_errors(config: RunConfig) -> list[SkdError]:
    """Return errors of references to models that show without asking for the models."""
    from skd_lib.models.references import parse_reference

    errors = []
    for reference in filter(None, (config.teacher, config.student)):
        try:
            parse_reference(reference)
        except SkdError as error:
            errors.append(error)
    return errors


def _data(config: RunConfig) -> tuple[dict[str, str], list[SkdError]]:
    """Return the format of the data and the sizes of the splits, where they are files of this machine, and errors."""
    from skd_lib.config import FilesSource
    from skd_lib.data.sources import find_columns
    from skd_lib.storage import is_remote

    source = config.data.source
    if not isinstance(source, FilesSource) or any(map(is_remote, [*source.train, *source.validation, *source.test])):
        return {}, []
    found: dict[str, str] = {}
    try:
        found["data"] = f"{find_columns(source)}; {', '.join(source.train)}"
        if sizes := _splits(config):
            found["splits"] = sizes
    except SkdErrors as several:
        return found, several.errors
    except SkdError as error:
        return found, [error]
    return found, []


def _splits(config: RunConfig) -> str:
    """Return the sizes of the splits; empty for data too large to be read here."""
    from skd_lib.data.sources import load_data
    from skd_lib.data.splits import divide

    rows = load_data(config.data, max_rows=_COUNTED)
    if any(len(split) >= _COUNTED for split in (rows.train, rows.validation or (), rows.test or ())):
        return ""
    made = divide(rows, config.data, config.seed, characters=_COMPARED)
    sizes = {"train": made.train_student, "validation": made.validation, "test": made.test}
    asked = {name: getattr(config.data, f"{name}_examples", None) or 0 for name in ("validation", "test")}
    fewer = [f"{name}_examples: {count}" for name, count in asked.items() if count > len(sizes[name])]
    text = ", ".join(f"{name} {len(split)}" for name, split in sizes.items())
    return f"{text}; fewer than {', '.join(fewer)}" if fewer else text


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
