"""`skd promote`, `skd rollback`, `skd lineage`, `skd track`: the registry and the records, from the command line."""

from __future__ import annotations

import getpass
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from skd_kfp.pipelines.cli.options import AsJson, RunsDir, TrackingUri, say_json
from skd_lib._core.terminal import say
from skd_lib._core.uris import default_store
from skd_lib.errors import SkdError

if TYPE_CHECKING:
    from skd_lib.tracking.gate import Move

track = typer.Typer(help="Records of steps for MLflow.", no_args_is_help=True, rich_markup_mode="markdown")

_WIDE = 100_000
Model = Annotated[str, typer.Argument(help="Registered model, e.g. skd-student.")]
Why = Annotated[str, typer.Option("--why", "-m", help="The reason, kept in the registry.")]
By = Annotated[str | None, typer.Option("--by", help="Who wants it.", show_default="the user of this machine")]


def promote(
    model: Model,
    version: Annotated[int, typer.Argument(min=1, help="Its version that becomes the champion.")],
    why: Why,
    by: By = None,
    as_json: AsJson = False,
    runs_dir: RunsDir = Path("runs"),
    tracking_uri: TrackingUri = None,
) -> None:
    """Make a registered version the champion, whatever the gate said.

    The alias `champion` moves. Who, when and why stand in the tags of the version that becomes champion and of the one
    that was.

    Example: `skd promote skd-student 3 --why "reads better"`.
    """
    from skd_lib.tracking import gate

    uri = _store(runs_dir, tracking_uri)
    _report(
        gate.promote(tracking_uri=uri, model=model, version=str(version), by=by or getpass.getuser(), why=_reason(why)),
        as_json=as_json,
    )


def rollback(
    model: Model,
    why: Why,
    by: By = None,
    as_json: AsJson = False,
    runs_dir: RunsDir = Path("runs"),
    tracking_uri: TrackingUri = None,
) -> None:
    """Make the champion before the present one the champion again; a second time, the one before that.

    Example: `skd rollback skd-student --why "it fails on names"`.
    """
    from skd_lib.tracking import gate

    uri = _store(runs_dir, tracking_uri)
    _report(gate.rollback(tracking_uri=uri, model=model, by=by or getpass.getuser(), why=_reason(why)), as_json=as_json)


def lineage(
    model: Annotated[
        str, typer.Argument(help="MODEL (its champion, else its challenger), MODEL@ALIAS or MODEL/VERSION.")
    ],
    as_json: AsJson = False,
    runs_dir: RunsDir = Path("runs"),
    tracking_uri: TrackingUri = None,
) -> None:
    """Show where a registered version comes from: weights, teacher, data, settings, code, images, pipeline run.

    Examples: `skd lineage skd-student`, `skd lineage skd-student/3 --json`.
    """
    from skd_lib._core.terminal import Console
    from skd_lib.tracking.lineage import render, trace

    found = trace(tracking_uri=_store(runs_dir, tracking_uri), reference=model)
    if as_json:
        say_json(found.model_dump(mode="json"))
    else:
        # Wider than any line: digests stay in one piece, to be copied.
        Console(width=_WIDE).print(render(found), highlight=False)


@track.callback()
def _track() -> None:
    """Keep `track` a group, although it has one command."""


@track.command()
def replay(
    files: Annotated[
        list[str], typer.Argument(help="What steps left behind, as they named it: paths or URIs in object storage.")
    ],
    tracking_uri: Annotated[
        str | None,
        typer.Option(
            help="MLflow tracking server, if it has another address by now.", show_default="the one the step used"
        ),
    ] = None,
) -> None:
    """Send MLflow what it did not take while it was down, in order, and delete the files.

    What MLflow has already is not sent twice. Where a later attempt at the step has begun, its tags and status stand.
    Several files are sent in the order in which their steps began.

    Example: `skd track replay runs/demo/tracking/RUN-distill-1a2b3c4d.jsonl`; the step's log has the file's name.
    """
    from skd_lib import storage
    from skd_lib.tracking.outbox import read_location
    from skd_lib.tracking.outbox import replay as send

    with tempfile.TemporaryDirectory() as folder:
        local = {
            file: storage.download(file, Path(folder) / str(number)) if storage.is_remote(file) else Path(file)
            for number, file in enumerate(files)
        }
        for file, path in sorted(local.items(), key=lambda item: read_location(item[1]).started):
            sent, refused = send(path, tracking_uri)
            storage.delete(file)
            say(f"{file}: {sent} entries sent" + (f", {refused} of them refused" if refused else ""))


def _store(runs_dir: Path, tracking_uri: str | None) -> str:
    if tracking_uri is not None:
        return tracking_uri
    if not (runs_dir / "mlflow.db").exists():
        raise SkdError(
            "there is no MLflow store",
            where=str(runs_dir / "mlflow.db"),
            hint="give --tracking-uri, or the folder of your runs with --runs-dir",
        )
    return default_store(runs_dir)


def _reason(why: str) -> str:
    if not why.strip():
        raise SkdError("a reason is needed", where="--why", hint="say it in words: it is what others will read")
    return why.strip()


def _report(move: Move, *, as_json: bool) -> None:
    if as_json:
        say_json(move)
        return
    before = f"version {move.before}" if move.before else "none"
    say(f"{move.model}: version {move.version} is the champion now; before, {before} was")
