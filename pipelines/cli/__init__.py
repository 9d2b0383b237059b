"""`skd`: run, compile and look after distillation pipelines."""

from __future__ import annotations

import json
import shutil
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from skd_kfp.pipelines.cli import registry
from skd_kfp.pipelines.cli.bench import bench
from skd_kfp.pipelines.cli.compare import compare
from skd_kfp.pipelines.cli.specdec import specdec

# `skd --help` answers at once: torch, transformers, MLflow and kfp are imported by the commands that need them.
from skd_kfp.pipelines.cli.submit import Set, submit
from skd_kfp.pipelines.cli.trigger import trigger
from skd_lib import __version__
from skd_lib._core.terminal import run_command, say, visible
from skd_lib._core.uris import default_store, how_to_look, shown, sqlite_file
from skd_lib.errors import SkdError

if TYPE_CHECKING:
    from skd_kfp.pipelines.local.containers import Containers
    from skd_kfp.pipelines.local.folder import RunFolder
    from skd_kfp.pipelines.local.runner import LocalRun
    from skd_lib._core.terminal import Console
    from skd_lib.config import RunConfig

app = typer.Typer(
    help="Speculative Knowledge Distillation as a Kubeflow pipeline, in a cluster or on this machine.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
app.add_typer(bench, name="bench")
app.add_typer(registry.track, name="track")
config = typer.Typer(rich_markup_mode="markdown")
app.add_typer(config, name="config")


def _named(option: typer.CallbackParam, image: str | None) -> str | None:
    """Refuse an empty name, e.g. of a shell's variable that is not set: the published image would be taken."""
    if image is not None and not image.strip():
        hint = "name an image, or leave the option out for the published one"
        raise SkdError("no image is named", where=option.opts[0], hint=hint)
    return image


Image = Annotated[
    str | None,
    typer.Option(
        envvar="SKD_IMAGE",
        help="Run every step but COMET's in this image, not in the published one.",
        callback=_named,
    ),
]
CometImage = Annotated[
    str | None,
    typer.Option(
        envvar="SKD_COMET_IMAGE", help="Run COMET's step in this image, not in the published one.", callback=_named
    ),
]


def main() -> None:
    """Entry point.

    Exit codes: 0 done; 1 a step of the run failed; 2 something to correct before a run can start; 70 a bug of skd, with
    its details in the file that the message names; 75 stopped by SIGTERM or SIGHUP, run again to go on;
    130 interrupted.
    """
    run_command(app)


def _show_version(wanted: bool) -> None:
    if wanted:
        say(f"skd {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    del version  # its callback has answered


@app.command()
def run(
    context: typer.Context,
    config: Annotated[Path, typer.Argument(help="The run's YAML file, e.g. pipelines/configs/demo.yaml.")],
    changes: Set = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check the config, print the plan and stop.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Forget finished steps and checkpoints, start over.")] = False,
    runs_dir: Annotated[Path, typer.Option(help="Where runs keep their files.")] = Path("runs"),
    tracking_uri: Annotated[
        str | None,
        typer.Option(
            envvar="MLFLOW_TRACKING_URI",
            help="MLflow tracking server; empty turns tracking off.",
            show_default="sqlite:///RUNS_DIR/mlflow.db",
        ),
    ] = None,
    experiment: Annotated[str, typer.Option(envvar="MLFLOW_EXPERIMENT_NAME", help="MLflow experiment.")] = "skd",
    docker: Annotated[
        bool,
        typer.Option(
            "--docker", help="Run each step in its image; without network where models, data and MLflow are local."
        ),
    ] = False,
    image: Image = None,
    comet_image: CometImage = None,
) -> None:
    """Run the whole pipeline on this machine.

    The steps are those of the cluster, as child processes or, with --docker, as containers. Running again reuses
    finished steps whose inputs have not changed, and resumes training from its last checkpoint.
    """
    from skd_lib._core.terminal import Console
    from skd_lib.config import load_config, parse_overrides, refuse_multinode
    from skd_lib.config.names import check_experiment, checked

    checked("--experiment", check_experiment, experiment)
    settings = load_config(config, parse_overrides(changes or ()))
    refuse_multinode(settings, where=str(config))
    if not docker:
        _refuse(context, "image", "comet_image", why="without --docker steps are processes, not containers")
    elif not settings.task.wants_comet:
        _refuse(context, "comet_image", why="the run's `task.metrics` do not name COMET")
    uri = default_store(runs_dir) if tracking_uri is None else tracking_uri
    console = Console(file=sys.stdout)  # this very stream: kfp's chatter is redirected from whatever is sys.stdout
    if dry_run:
        _print_plan(console, settings, runs_dir / settings.name, uri)
        return

    from skd_kfp.pipelines.local.stopping import explain_end, same_command

    with explain_end(same_command()):
        from skd_kfp.pipelines.compiling import compile_pipeline, pipeline_for
        from skd_kfp.pipelines.graph import read_steps
        from skd_kfp.pipelines.local.folder import RunFolder
        from skd_kfp.pipelines.local.progress import display_for
        from skd_kfp.pipelines.local.runner import run_pipeline

        documents = compile_pipeline(image, comet_image, name=pipeline_for(settings))
        steps = len(read_steps(documents[0]))
        folder = RunFolder.create(runs_dir, settings.name)
        containers = _containers(settings, folder, image, comet_image, uri) if docker else None
        _say(
            console, f"run {settings.name}: {steps} steps, files in {_short(folder.root)}, MLflow {shown(uri) or 'off'}"
        )
        finished = run_pipeline(
            settings,
            folder,
            documents,
            display_for(console, settings.name, steps),
            tracking_uri=uri,
            experiment=experiment,
            fresh=fresh,
            containers=containers,
        )
        _conclude(console, finished, folder, uri)


def _containers(
    config: RunConfig, folder: RunFolder, image: str | None, comet_image: str | None, tracking_uri: str
) -> Containers:
    """What runs the steps in their images."""
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


def _print_plan(console: Console, config: RunConfig, folder: Path, tracking_uri: str) -> None:
    from rich.table import Table

    from skd_kfp.pipelines.compiling import compile_pipeline, pipeline_for
    from skd_kfp.pipelines.graph import read_steps

    table = Table("step", "runs", "after", title=f"run {config.name}", title_justify="left", box=None)
    for step in read_steps(compile_pipeline(name=pipeline_for(config))[0]):
        after = "everything" if step.is_exit else ", ".join(step.waits_for) or "-"
        table.add_row(step.name, f"python3 -m {step.command}", after)
    console.print(table)
    student = config.student or f"cut from the teacher ({config.student_init.mode})"
    for name, value in {
        "teacher": config.teacher,
        "student": student,
        "method": f"{config.distill.method}, {config.distill.divergence}",
        "files": str(folder),
        "MLflow": shown(tracking_uri) or "off",
    }.items():
        _say(console, f"{name:<8} {value}")


def _conclude(console: Console, run: LocalRun, folder: RunFolder, tracking_uri: str) -> None:
    """The table, where things are, and what to type next."""
    from skd_lib.config import parse_section
    from skd_lib.models.records import RECORD, SAMPLES
    from skd_lib.report.page import write_page
    from skd_lib.report.render import render
    from skd_lib.models.samples import read_samples
    from skd_lib.report.summary import Summary

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
        _say(console, f"{name:<8} {_short(path)}")
    if tracking_uri:
        _say(console, f"MLflow   {how_to_look(tracking_uri)}")
    if run.outcome:
        _say(console, visible(run.outcome))


def _refuse(context: typer.Context, *names: str, why: str, hint: str = "leave it out") -> None:
    """Refuse options without effect. In the environment they may be meant for other commands.

    Raises:
        SkdError: one is on the command line.
    """
    for name in names:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            raise SkdError(f"it has no effect: {why}", where=f"--{name.replace('_', '-')}", hint=hint)


@app.command("compile")
def compile_(
    context: typer.Context,
    check: Annotated[
        bool, typer.Option("--check", help="Write nothing; fail if the committed file differs from its definition.")
    ] = False,
    image: Image = None,
    comet_image: CometImage = None,
    output: Annotated[
        Path | None, typer.Option(help="File of one pipeline.", show_default="pipelines/compiled/PIPELINE.yaml")
    ] = None,
    pipeline: Annotated[
        str | None,
        typer.Option(
            help="distillation, distillation_comet or compare_methods.", show_default="all; with --output distillation"
        ),
    ] = None,
    profile: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FILE",
            help="What the steps ask of the cluster: cpu, l4, a100, h100x8, or a YAML file like those in "
            "pipelines/resources.",
            show_default="l4",
        ),
    ] = None,
    release: Annotated[
        bool, typer.Option("--release", help="Insist on images that are named by their digest, as a release must.")
    ] = False,
) -> None:
    """Compile the pipelines to the YAML that Kubeflow runs, and check them for mistakes KFP does not see.

    Write the READMEs of the components, too. With --check every profile is compiled and checked.
    """
    from skd_kfp.components.build import check_readmes, write_readmes
    from skd_kfp.pipelines.compiling import (
        PIPELINES,
        check_compiled,
        compile_pipeline,
        compiled_path,
        images_of,
        write_compiled,
    )
    from skd_kfp.pipelines.kubeflow.sizes import of_compiled
    from skd_kfp.pipelines.profiles import DEFAULT, profile_names

    if pipeline not in (None, *PIPELINES):
        raise SkdError(f"there is no pipeline {pipeline!r}", where="--pipeline", hint=f"one of {', '.join(PIPELINES)}")
    names = [pipeline] if pipeline else ["distillation"] if output else list(PIPELINES)
    paths = {name: output or compiled_path(name) for name in names}
    chosen = profile or DEFAULT
    if not check and "distillation_comet" not in names:
        why = f"the pipeline {names[0]} has no step for COMET"
        _refuse(context, "comet_image", why=why, hint="give --pipeline distillation_comet, or leave it out")
    if check:
        _refuse(context, "image", "comet_image", why="the committed pipelines name the published images")
        for name, path in paths.items():
            check_compiled(path, name=name, profile=chosen, release=release)
            say(f"{_short(path)} is up to date")
            for other in () if profile else profile_names():
                compile_pipeline(name=name, profile=other)
                say(f"{name} for profile {other} keeps the rules")
        if output is None:
            check_readmes()
            say("the components' READMEs are up to date")
        return
    if (image or comet_image or profile) and output is None:
        raise SkdError(
            "images and profiles of your own do not belong in the committed pipeline",
            where="skd compile",
            hint="name another file with --output",
        )
    for name, path in paths.items():
        documents = write_compiled(path, image, comet_image, name=name, profile=chosen, release=release)
        trials = 4 if name == "compare_methods" else 1
        say(f"wrote {_short(path)}{'; with 4 trials' if trials > 1 else ';'} {of_compiled(documents, trials)}")
        say(f"its images: {', '.join(images_of(documents))}")
    if output is None:
        write_readmes()


@app.command()
def report(
    run: Annotated[
        str, typer.Argument(help="Folder of a finished run, its name under RUNS_DIR, or the id of an MLflow run.")
    ],
    output: Annotated[
        Path | None,
        typer.Option(help="File to write.", show_default="report.html in the run's folder; for MLflow: here"),
    ] = None,
    open_: Annotated[bool, typer.Option("--open", help="Show the page in the browser.")] = False,
    runs_dir: Annotated[Path, typer.Option(help="Where runs keep their files.")] = Path("runs"),
    tracking_uri: Annotated[
        str, typer.Option(envvar="MLFLOW_TRACKING_URI", help="MLflow tracking server that holds the run.")
    ] = "",
) -> None:
    """Make the page of a run again, from the figures and samples that the run left behind.

    The page is one HTML file: send it, open it, no server and no network needed.
    """
    from skd_lib.report.page import write_page
    from skd_lib.report.sources import PAGE, from_folder, from_mlflow

    folder = next((path for path in (Path(run), runs_dir / run) if path.is_dir()), None)
    if folder is not None:
        found, path = from_folder(folder), output or folder / PAGE
    elif tracking_uri:
        found, path = from_mlflow(run, tracking_uri), output or Path(PAGE)
    else:
        raise SkdError(
            f"there is no folder {run} or {runs_dir / run}",
            where="skd report",
            hint="name a run's folder, or give --tracking-uri with the id of an MLflow run",
        )
    try:
        write_page(path, found.summary, found.samples)
    except OSError as error:
        raise SkdError(
            f"cannot write the page: {error.strerror}", where=str(path), hint="choose another --output"
        ) from error
    say(_short(path))
    if open_:
        typer.launch(path.resolve().as_uri())


@app.command()
def doctor(
    runs_dir: Annotated[Path, typer.Option(help="Where runs keep their files.")] = Path("runs"),
    tracking_uri: Annotated[
        str | None,
        typer.Option(
            envvar="MLFLOW_TRACKING_URI", help="MLflow tracking server.", show_default="sqlite:///RUNS_DIR/mlflow.db"
        ),
    ] = None,
    kubeflow: Annotated[
        bool, typer.Option("--kubeflow", help="Look at the cluster too: whether it tries failed steps again.")
    ] = False,
    namespace: Annotated[str, typer.Option(help="With --kubeflow: where Kubeflow Pipelines is.")] = "kubeflow",
) -> None:
    """Look at this machine: what is installed, what it can do, what can be reached. Exit code 1 if something fails."""
    from skd_lib._core.terminal import Console
    from skd_lib.preflight.cluster import examine_kubeflow
    from skd_lib.preflight.machine import Grade, examine, render

    uri = default_store(runs_dir) if tracking_uri is None else tracking_uri
    findings = [*examine(runs_dir, uri), *(examine_kubeflow(namespace) if kubeflow else [])]
    Console().print(render(findings))
    if any(finding.grade is Grade.FAIL for finding in findings):
        raise typer.Exit(1)


@config.callback(invoke_without_command=True)
def list_config(context: typer.Context) -> None:
    """List every field of a run's YAML file: type, default, meaning. `skd config schema` is for editors."""
    if context.invoked_subcommand is not None:
        return
    from skd_lib.config import RunConfig
    from skd_lib.config.fields import list_fields

    for field in list_fields(RunConfig):
        say(f"{field.path}: {field.type}{field.default}")
        if field.description:
            say(textwrap.fill(field.description, 100, initial_indent="    ", subsequent_indent="    "))


@config.command()
def schema() -> None:
    """Print the JSON schema of a run's YAML file, by which an editor completes and checks it.

    In VS Code (YAML extension) or any editor with yaml-language-server: `skd config schema > skd.schema.json`, and as
    the first line of your file `# yaml-language-server: $schema=skd.schema.json`.
    """
    from skd_lib.config import RunConfig

    say(json.dumps(RunConfig.model_json_schema(), indent=2))


app.command()(specdec)
for command in (compare, submit, trigger, registry.promote, registry.rollback, registry.lineage):
    app.command()(command)


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _short(path: Path) -> str:
    """The path as seen from here, where that is shorter."""
    try:
        return str(path.absolute().relative_to(Path.cwd()))
    except ValueError:
        return str(path)
