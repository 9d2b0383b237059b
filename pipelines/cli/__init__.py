"""`skd`: run, compile and look after distillation pipelines."""

from __future__ import annotations

import difflib
import json
import textwrap
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

# `skd --help` answers at once: torch, transformers, MLflow and kfp are imported inside the commands that need them.
from skd_kfp.pipelines.cli.bench import bench
from skd_kfp.pipelines.cli.compare import compare
from skd_kfp.pipelines.cli.compile import compile_
from skd_kfp.pipelines.cli.draft import draft
from skd_kfp.pipelines.cli.engine import engine
from skd_kfp.pipelines.cli.evaluate import evaluate
from skd_kfp.pipelines.cli.generate import generate
from skd_kfp.pipelines.cli.init import init
from skd_kfp.pipelines.cli.options import AsJson, RunsDir, TrackingUri, expanded, say_json, short
from skd_kfp.pipelines.cli.plan import plan
from skd_kfp.pipelines.cli.publish import card, push
from skd_kfp.pipelines.cli.registry import lineage, promote, rollback, track
from skd_kfp.pipelines.cli.run import run
from skd_kfp.pipelines.cli.runs import runs
from skd_kfp.pipelines.cli.specdec import specdec
from skd_kfp.pipelines.cli.submit import submit
from skd_kfp.pipelines.cli.trigger import trigger
from skd_lib import __version__
from skd_lib._core.terminal import run_command, say
from skd_lib._core.uris import default_store
from skd_lib.errors import SkdError

if TYPE_CHECKING:
    from skd_lib.comparison.table import Comparison
    from skd_lib.report.sources import Findings

app = typer.Typer(
    help="Speculative Knowledge Distillation as a Kubeflow pipeline, in a cluster or on this machine.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    epilog="Exit codes: 0 done; 1 a step of a run failed, or a check of doctor; 2 something to correct; 3 a run in "
    "Kubeflow was cancelled; 70 a bug of skd; 75 stopped by a signal, or by what may pass by itself (storage that does "
    "not answer), run again to go on; 130 interrupted.",
)
RUN, MODELS, PUBLISH, RECORDS, SET_UP = (
    *("Train a student", "Look at a model", "Give a model to others", "Look after runs and versions"),
    "Set up",
)


def main() -> None:
    """Run the command line.

    Exit codes are those of `skd --help`; the message of a bug (70) names the file with its details.
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


def report(
    run: Annotated[
        str,
        typer.Argument(
            help="Folder of a finished run or comparison, its name under RUNS_DIR, or the id of an MLflow run."
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            help="File to write.",
            show_default="report.html, or comparison.html of a comparison, in its folder; for MLflow: here",
        ),
    ] = None,
    open_: Annotated[bool, typer.Option("--open", help="Show the page in the browser.")] = False,
    as_json: AsJson = False,
    runs_dir: RunsDir = Path("runs"),
    tracking_uri: Annotated[
        str, typer.Option(envvar="MLFLOW_TRACKING_URI", help="MLflow tracking server that holds the run.")
    ] = "",
) -> None:
    """Make the page of a run or a comparison again, from the figures and samples that it left behind.

    The page is one HTML file: send it, open it, no server and no network needed. With --json the figures are printed,
    too.

    Examples: `skd report demo --open`, `skd report compare-demo`, `skd report demo --json`.
    """
    from skd_lib.comparison import page as comparisons
    from skd_lib.comparison.table import COMPARISON, Comparison
    from skd_lib.report.page import render_page
    from skd_lib.report.sources import PAGE, from_folder, from_mlflow
    from skd_lib.storage import write_text_atomic

    folder = next((path for path in (Path(run), runs_dir / run) if path.is_dir()), None)
    found: Findings | Comparison
    if folder is not None and (folder / COMPARISON).is_file():
        found, path = Comparison.read(folder / COMPARISON), output or folder / comparisons.PAGE
    elif folder is not None:
        found, path = from_folder(folder), output or folder / PAGE
    elif tracking_uri:
        found, path = from_mlflow(run, tracking_uri), output or Path(PAGE)
    else:
        raise SkdError(
            f"there is no folder {run} or {runs_dir / run}",
            where="skd report",
            hint="name a run's folder, or give --runs-dir with its name, or --tracking-uri with an MLflow run's id",
        )
    if isinstance(found, Comparison):
        page, figures = comparisons.render_page(found), {"comparison": found.to_dict()}
    else:
        page, figures = render_page(found.summary, found.samples), {"summary": found.summary.to_dict()}
    try:
        write_text_atomic(path, page)
    except OSError as error:
        raise SkdError(
            f"cannot write the page: {error.strerror}", where=str(path), hint="choose another --output"
        ) from error
    if as_json:
        say_json({"page": str(path), **figures})
    else:
        say(short(path))
    if open_:
        typer.launch(path.resolve().as_uri())


def doctor(
    runs_dir: RunsDir = Path("runs"),
    tracking_uri: TrackingUri = None,
    kubeflow: Annotated[
        bool, typer.Option("--kubeflow", help="Look at the cluster too: whether it tries failed steps again.")
    ] = False,
    namespace: Annotated[str, typer.Option(help="With --kubeflow: where Kubeflow Pipelines is.")] = "kubeflow",
    as_json: AsJson = False,
) -> None:
    """Look at this machine: what is installed, what it can do, what can be reached. Exit code 1 if something fails.

    Examples: `skd doctor`, `skd doctor --kubeflow --namespace kubeflow`.
    """
    from skd_lib._core.terminal import Console
    from skd_lib.preflight.checks import table
    from skd_lib.preflight.cluster import check_retries
    from skd_lib.preflight.machine import examine

    uri = default_store(runs_dir) if tracking_uri is None else tracking_uri
    checks = [*examine(runs_dir, uri), *([check_retries(namespace)] if kubeflow else [])]
    failed = any(check.level == "error" for check in checks)
    if as_json:
        say_json({"ok": not failed, "checks": checks})
    else:
        Console().print(table("This machine", checks))
    if failed:
        raise typer.Exit(1)


def config(
    section: Annotated[
        str,
        typer.Argument(help="List this section or field only, e.g. `distill`; `schema`: print the JSON schema."),
    ] = "",
    as_json: AsJson = False,
) -> None:
    """List the fields of a run's YAML file: type, default, meaning.

    `skd config schema` prints the file's JSON schema, by which an editor completes and checks it. In VS Code (YAML
    extension) or any editor with yaml-language-server: `skd config schema > skd.schema.json`, and as the first line of
    your file `# yaml-language-server: $schema=skd.schema.json`.

    Example: `skd config distill.sampling`.
    """
    from skd_lib.config import RunConfig
    from skd_lib.config.fields import list_fields

    if section == "schema":
        say(json.dumps(RunConfig.model_json_schema(), indent=2))
        return
    wanted = section.replace("[]", "")
    fields = {field: field.path.partition(" ")[0].replace("[]", "") for field in list_fields(RunConfig)}
    listed = [field for field, path in fields.items() if not wanted or f"{path}.".startswith(f"{wanted}.")]
    if not listed:
        inner = [path for path in fields.values() if path.endswith(f".{wanted}")]
        similar = inner or difflib.get_close_matches(wanted, fields.values(), n=1)
        hint = f"did you mean `{similar[0]}`?" if similar else f"a section of {', '.join(RunConfig.model_fields)}"
        raise SkdError(f"a run's file has no section or field `{section}`", where="skd config", hint=hint)
    if as_json:
        say_json([{**asdict(field), "default": field.default.removeprefix(" = ")} for field in listed])
        return
    for field in listed:
        say(f"{field.path}: {field.type}{field.default}")
        if field.description:
            say(textwrap.fill(field.description, 100, initial_indent="    ", subsequent_indent="    "))


GROUPS: dict[str, tuple[Callable[..., None], ...]] = {
    RUN: (init, plan, run, draft, compare, submit, trigger),
    MODELS: (evaluate, generate, specdec),
    PUBLISH: (card, push),
    RECORDS: (runs, report, lineage, promote, rollback),
    SET_UP: (doctor, config),
}
for group, commands in GROUPS.items():
    for command in commands:
        app.command(rich_help_panel=group)(expanded(command))
app.command("compile", rich_help_panel=SET_UP)(compile_)
app.add_typer(track, name="track", rich_help_panel=RECORDS)
app.add_typer(bench, name="bench", rich_help_panel=SET_UP)
app.add_typer(engine, name="engine", rich_help_panel=SET_UP)
