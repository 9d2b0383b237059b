"""`skd submit`: start a run, or a schedule of runs, in Kubeflow."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from skd_kfp.pipelines.cli.options import AsJson, Cluster, Set, say_json
from skd_lib._core.terminal import say
from skd_lib.errors import SkdError

if TYPE_CHECKING:
    from skd_kfp.pipelines.kubeflow.api import KubeflowPipelines

FAILED, CANCELLED, INTERRUPTED = 1, 3, 130


def submit(
    config: Annotated[Path, typer.Argument(help="The YAML file of a run, or of a comparison.")],
    cluster: Cluster,
    changes: Set = None,
    wait: Annotated[
        bool,
        typer.Option("--wait", help="Follow the run to its end; exit code 1 if it fails, 3 if it is cancelled."),
    ] = False,
    recurring: Annotated[
        str | None, typer.Option(metavar="CRON", help='Run it on a schedule instead, e.g. "0 3 * * *" (UTC).')
    ] = None,
    name: Annotated[str, typer.Option(help="Name of the run.", show_default="the config's, and the time")] = "",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check the config, say what would run, and stop.")] = False,
    tracking_uri: Annotated[
        str,
        typer.Option(
            envvar="SKD_TRACKING_URI",
            help="MLflow server, as this machine reaches it, whose runs table is named; the run logs to that of "
            "--settings.",
            show_default="no address is shown",
        ),
    ] = "",
    as_json: AsJson = False,
) -> None:
    """Run the pipeline in Kubeflow; for a comparison's file the pipeline `compare_methods`.

    The compiled pipeline is uploaded where the server does not have it yet. With --wait Ctrl-C ends the waiting, not
    the run. With --json standard output is the run's id and page, and all else goes to standard error.
    With --tracking-uri there is also the address of MLflow's runs table.

    Examples: `skd submit run.yaml --host https://kubeflow.example.com/pipeline --wait`,
    `skd submit run.yaml --recurring "0 3 * * *" --dry-run`.
    """
    from skd_kfp.pipelines.compiling import compiled_path, pipeline_for
    from skd_kfp.pipelines.kubeflow.checks import described
    from skd_kfp.pipelines.kubeflow.submit import Package, Submission
    from skd_lib.comparison.config import is_comparison, load_compare
    from skd_lib.comparison.plan import plan
    from skd_lib.config import load_config, parse_overrides

    cluster.check(name)
    schedule = {} if recurring is None else {"schedule": described(recurring)}
    if recurring is not None and wait:
        raise SkdError("a recurring run has no end", where="--wait", hint="leave out --wait or --recurring")
    overrides = parse_overrides(changes or ())
    comparison = plan(*load_compare(config, overrides), where=str(config)) if is_comparison(config) else None
    run_config = comparison.base if comparison else load_config(config, overrides)
    package = Package.read(
        cluster.pipeline or compiled_path("compare_methods" if comparison else pipeline_for(run_config))
    )
    # A recurring run is found again by its name, which therefore holds no time.
    chosen = name or (run_config.name if recurring is not None else "")
    submission = Submission.plan(run_config, package, cluster.target, chosen, comparison)
    facts = {**submission.describe(), **schedule}
    tell = partial(say, err=as_json)  # what is for people only
    for what, value in facts.items():
        tell(f"{what:<12} {value}")
    plain = {name.lower(): text for name, text in facts.items()}
    if dry_run:
        if as_json:
            say_json(plain)
        return
    api = cluster.connect()
    tell(f"{'asking':<12} {api.host}")
    api.check_listening()
    if recurring is not None:
        kind, identifier = "recurringrun", submission.schedule(api, recurring).recurring_run_id
    else:
        kind, identifier = "runs", submission.start(api, submission.prepare(api)).run_id
    link = cluster.link(kind, identifier)
    table = _runs_table(tracking_uri, cluster.mlflow_experiment)
    if as_json:
        which = "recurring_run_id" if kind == "recurringrun" else "run_id"
        say_json({**plain, which: identifier, "url": link, **({"runs_table": table} if table else {})})
    else:
        say(link)
        if table:
            say(table)
    if wait:
        _wait(api, identifier, submission.package.documents[0], tell)


def _runs_table(tracking_uri: str, experiment: str) -> str:
    """Return the address of MLflow's runs table; empty where no server is given."""
    from skd_lib.steps.environment import EXPERIMENT_VARIABLE
    from skd_lib.tracking.client import server_address
    from skd_lib.tracking.view import where_to_look

    if not server_address(tracking_uri):
        return ""
    experiment = experiment or os.environ.get(EXPERIMENT_VARIABLE) or "skd"  # as the steps do
    return where_to_look(tracking_uri, experiment)["MLflow"]


def _wait(api: KubeflowPipelines, run_id: str, spec: dict[str, Any], tell: Callable[[str], None]) -> None:
    from skd_kfp.pipelines.graph import read_steps
    from skd_kfp.pipelines.kubeflow.follow import ending, follow

    try:
        followed = follow(api, run_id, spec, read_steps(spec), tell)
    except KeyboardInterrupt as interruption:
        say("\nno longer waiting; the run goes on in the cluster", err=True)
        raise typer.Exit(INTERRUPTED) from interruption
    whole, *parts = ending(followed, api.namespace)
    if followed.succeeded:
        tell("\n".join([whole, *(f"note: {part}" for part in parts)]))
        return
    say(whole if followed.cancelled else f"error: {whole}", err=True)
    for part in parts:
        say(f"- {part}", err=True)
    raise typer.Exit(CANCELLED if followed.cancelled else FAILED)
