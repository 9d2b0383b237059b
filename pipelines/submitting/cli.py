"""`skd submit`: a run in Kubeflow, from the command line."""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated
from urllib.parse import urlsplit

import typer

from pipelines.submitting.credentials import Auth
from skd_lib.errors import SkdError
from skd_lib.terminal import say
from skd_lib.uris import shown

if TYPE_CHECKING:
    from pipelines.submitting.api import KubeflowPipelines

# Nothing heavy at the top: `skd --help` has to answer at once.

FAILED, INTERRUPTED = 1, 130

# An option that `skd run` has too.
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="FIELD=VALUE",
        help="Another value than the file's, e.g. distill.sampling.top_k=5; null unsets a field. Repeatable.",
    ),
]

# Options that `skd trigger` has too.
Host = Annotated[
    str,
    typer.Option(
        envvar="KF_PIPELINES_ENDPOINT", help="API of Kubeflow Pipelines, e.g. https://kubeflow.example.com/pipeline."
    ),
]
UiHost = Annotated[
    str,
    typer.Option(envvar="KF_PIPELINES_UI_ENDPOINT", help="Kubeflow's page, for links.", show_default="HOST"),
]
AuthKind = Annotated[
    Auth,
    typer.Option(
        help="Credentials: the service account's token, an OpenID Connect token (SKD_KFP_TOKEN, SKD_KFP_TOKEN_FILE, or "
        "Google's for --audience) or Dex's session cookie (SKD_KFP_COOKIE, SKD_KFP_COOKIE_FILE); auto takes the first "
        "that is there."
    ),
]
Audience = Annotated[str, typer.Option(help="Audience of id-tokens: Identity-Aware Proxy's OAuth client.")]
Namespace = Annotated[str, typer.Option(help="Profile, in a multi-user Kubeflow.", show_default="none")]
Experiment = Annotated[
    str, typer.Option(envvar="MLFLOW_EXPERIMENT_NAME", help="Experiment, in Kubeflow and in MLflow.")
]
TrackingUri = Annotated[
    str,
    typer.Option(envvar="SKD_TRACKING_URI", help="MLflow tracking server, as the cluster sees it.", show_default="off"),
]
CheckpointRoot = Annotated[
    str, typer.Option(help="Where training keeps checkpoints: gs:// or a mounted folder.", show_default="none")
]
PipelineRoot = Annotated[str, typer.Option(help="Where Kubeflow keeps artifacts.", show_default="its own default")]
ServiceAccount = Annotated[
    str, typer.Option(help="Kubernetes service account of the run's pods.", show_default="Kubeflow's default")
]
Pipeline = Annotated[
    Path | None, typer.Option(help="Compiled pipeline.", show_default="pipelines/compiled/distillation.yaml")
]


@dataclass(frozen=True)
class Server:
    """A Kubeflow Pipelines server as the options name it."""

    host: str
    ui_host: str
    auth: Auth
    audience: str
    namespace: str

    def connect(self) -> KubeflowPipelines:
        """Its API.

        Raises:
            SkdError: the host or the credentials are missing.
        """
        from pipelines.submitting.api import KubeflowPipelines
        from pipelines.submitting.credentials import find_credentials

        if not _is_url(self.host):
            raise SkdError(
                "no URL of Kubeflow Pipelines" if not self.host else "not a URL",
                where=shown(self.host) or "--host",
                hint="give --host https://... or set KF_PIPELINES_ENDPOINT",
            )
        # urllib3 warns of each of its repetitions; what a person needs to know is in the error that ends them.
        logging.getLogger("urllib3").setLevel(logging.ERROR)
        return KubeflowPipelines(self.host, find_credentials(self.auth, self.host, self.audience), self.namespace)

    def link(self, kind: str, identifier: str) -> str:
        """The page of a run (`runs`) or a recurring run (`recurringrun`)."""
        return f"{shown(self.ui_host or self.host).rstrip('/')}/#/{kind}/details/{identifier}"


def _is_url(host: str) -> bool:
    try:
        url = urlsplit(host)
        return url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
    except ValueError:  # a port that is none
        return False


def submit(
    config: Annotated[Path, typer.Argument(help="The run's YAML file.")],
    changes: Set = None,
    host: Host = "",
    wait: Annotated[bool, typer.Option("--wait", help="Follow the run to its end; exit code 1 if it fails.")] = False,
    recurring: Annotated[
        str | None, typer.Option(metavar="CRON", help='Run it on a schedule instead, e.g. "0 3 * * *" (UTC).')
    ] = None,
    name: Annotated[str, typer.Option(help="Name of the run.", show_default="the config's, and the time")] = "",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check the config, say what would run, and stop.")] = False,
    auth: AuthKind = Auth.AUTO,
    audience: Audience = "",
    namespace: Namespace = "",
    experiment: Experiment = "skd",
    tracking_uri: TrackingUri = "",
    checkpoint_root: CheckpointRoot = "",
    pipeline_root: PipelineRoot = "",
    service_account: ServiceAccount = "",
    pipeline: Pipeline = None,
    ui_host: UiHost = "",
) -> None:
    """Run the pipeline in Kubeflow.

    The compiled pipeline is uploaded where the server does not have it yet. With --wait Ctrl-C ends the waiting, not
    the run.
    """
    from pipelines.compiling import compiled_path
    from pipelines.submitting.submit import Package, Place, Submission, with_seconds
    from skd_lib.config import load_config, parse_overrides
    from skd_lib.config.names import check_experiment, check_line, checked

    if name:
        checked("--name", check_line, name)
    checked("--experiment", check_experiment, experiment)
    if recurring is not None:
        with_seconds(recurring)  # before anything is uploaded
        if wait:
            raise SkdError("a recurring run has no end", where="--wait", hint="leave out --wait or --recurring")
    settings = load_config(config, parse_overrides(changes or ()))
    place = Place(experiment, tracking_uri, checkpoint_root, pipeline_root, service_account)
    # A recurring run is found again by its name, which therefore holds no time.
    chosen = name or (settings.name if recurring is not None else "")
    submission = Submission.plan(settings, Package.read(pipeline or compiled_path()), place, chosen)
    for what, value in submission.describe().items():
        say(f"{what:<12} {value}")
    server = Server(host, ui_host, auth, audience, namespace)
    if dry_run:
        return
    api = server.connect()
    say(f"{'asking':<12} {api.host}")
    api.check_listening()
    if recurring is not None:
        say(server.link("recurringrun", submission.schedule(api, recurring).recurring_run_id))
        return
    run = api.create_run(submission.prepare(api))
    say(server.link("runs", run.run_id))
    if wait:
        _wait(api, run.run_id, submission.package.documents[0])


def _wait(api: KubeflowPipelines, run_id: str, spec: dict[str, object]) -> None:
    from pipelines.graph import count_steps, read_steps
    from pipelines.progress import PlainDisplay
    from pipelines.submitting.follow import SUCCEEDED, failures, follow
    from skd_lib.console import Console

    steps = read_steps(spec)
    try:
        # Lines, not bars: in a cluster steps run side by side.
        run = follow(api, run_id, steps, PlainDisplay(Console(file=sys.stdout), count_steps(steps)))
    except KeyboardInterrupt as interruption:
        say("\nno longer waiting; the run goes on in the cluster", err=True)
        raise typer.Exit(INTERRUPTED) from interruption
    if run.state == SUCCEEDED:
        say("the run succeeded")
        return
    why = (run.error and run.error.message) or ""
    say(f"error: the run ended as {run.state}{': ' if why else ''}{why}", err=True)
    for failure in failures(run, steps):
        say(f"- {failure}", err=True)
    raise typer.Exit(FAILED)
