"""`skd trigger`: start a run when new data has arrived."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Annotated

import typer

from skd_kfp.pipelines.cli.options import Cluster, say_json
from skd_lib._core.terminal import say
from skd_lib.errors import SkdError


def trigger(
    source: Annotated[
        str, typer.Argument(help="Where the new data is: a folder, a gs:// URI, or the config's dataset of the hub.")
    ],
    config: Annotated[
        Path, typer.Option("--config", help="The run's YAML file; {source} in its data files stands for SOURCE.")
    ],
    cluster: Cluster,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say whether a run would start, and why; start none.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the decision as one line of JSON.")] = False,
    claims: Annotated[
        str,
        typer.Option(
            envvar="SKD_CLAIMS",
            help="Folder or gs:// URI by which processes that are triggered at the same time agree who starts the run.",
            show_default="none: only the processes of one machine agree",
        ),
    ] = "",
    marker: Annotated[
        str, typer.Option(help="Name of the file in SOURCE that is written last, when the data is complete.")
    ] = "_SUCCESS",
    attempts: Annotated[
        int, typer.Option(min=1, help="Runs on the same data that may fail before no more are started.")
    ] = 1,
    tracking_uri: Annotated[
        str,
        typer.Option(
            envvar="SKD_TRACKING_URI",
            help="MLflow server that is asked for earlier runs on the same data; the run asks that of --settings.",
            show_default="none is asked",
        ),
    ] = "",
    max_drop: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            help="For drafts: start a run only if, on the new prompts, the teacher accepts a smaller share of the "
            "champion's drafts than it had by more than this share, e.g. 0.1. Measured here; needs --tracking-uri.",
            show_default="new data is enough",
        ),
    ] = None,
) -> None:
    """Run the pipeline in Kubeflow if SOURCE has data that it has not run on yet.

    The run is named after a fingerprint of the data, the settings and the pipeline. There is none while the data is
    incomplete, and none if one of that name waits, runs, has succeeded, was cancelled by a person, or has failed
    --attempts times.

    Exit codes: 0 a run was started, or there is nothing to start (--json says which: `fire`); 2 something to correct,
    the server does not answer, another process holds the claim, or it is not known whether a run started; 70 a bug of
    skd. How the run ends is not waited for.

    Examples: `skd trigger gs://bucket/new --config run.yaml --dry-run`,
    `skd trigger /logs/today --config draft.yaml --tracking-uri http://mlflow:5000 --max-drop 0.1`.
    """
    from skd_kfp.pipelines.compiling import compiled_path, pipeline_for
    from skd_kfp.pipelines.kubeflow.submit import Package
    from skd_kfp.pipelines.kubeflow.trigger import Trigger, check_source
    from skd_lib.config import load_config

    if not source.strip():
        raise SkdError("must not be empty", where="SOURCE", hint="name the folder that the data is in")
    if not marker.strip() or "/" in marker or marker in (".", ".."):
        raise SkdError(f"{marker!r} is not the name of a file", where="--marker", hint="e.g. _SUCCESS")
    if max_drop is not None and not tracking_uri:
        hint = "give --tracking-uri, the MLflow server whose registry has the champion"
        raise SkdError("the champion and its acceptance are read from MLflow", where="--max-drop", hint=hint)
    if max_drop is not None and importlib.util.find_spec("torch") is None:
        hint = "run the command where the extra `training` is installed, with a GPU for the teacher, or leave it out"
        raise SkdError("teacher and champion decode here, and torch is not installed", where="--max-drop", hint=hint)
    cluster.check()
    run_config = load_config(config)
    check_source(run_config, source)  # before the server is asked
    package = Package.read(cluster.pipeline or compiled_path(pipeline_for(run_config)))
    bound = Trigger(
        run_config, package, cluster.target, cluster.connect(), claims, marker, attempts, tracking_uri, max_drop
    )
    decision = bound.explain(source) if dry_run else bound.fire(source)
    if as_json:
        say_json(decision, lines=True)
        return
    verb = "would start" if dry_run else "started"
    say(f"{verb if decision.fire else 'nothing to start'}: {decision.reason}")
    if decision.name:
        say(f"run {decision.name}")
    if decision.run_id:
        say(cluster.link("runs", decision.run_id))
