"""`skd submit`: a run in Kubeflow, from the command line."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import urlsplit

import typer

from skd_kfp.pipelines.kubeflow.auth import Auth
from skd_lib._core.terminal import say
from skd_lib._core.uris import shown
from skd_lib.errors import SkdError
from skd_lib.steps.environment import VOLUMES

if TYPE_CHECKING:
    from skd_kfp.pipelines.kubeflow.api import KubeflowPipelines

# Nothing heavy at the top: `skd --help` has to answer at once.

FAILED, CANCELLED, INTERRUPTED = 1, 3, 130

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
Experiment = Annotated[str, typer.Option(help="Experiment in Kubeflow.")]
MlflowExperiment = Annotated[
    str, typer.Option(help="Experiment in MLflow.", show_default="as the ConfigMap of --settings says")
]
Settings = Annotated[
    str,
    typer.Option(
        help="ConfigMap in the run's namespace that says where MLflow and checkpoints are; it need not exist.",
    ),
]
PipelineRoot = Annotated[
    str,
    typer.Option(
        envvar="SKD_PIPELINE_ROOT", help="Where Kubeflow keeps artifacts, e.g. gs://...", show_default="its own default"
    ),
]
NoReuse = Annotated[
    bool, typer.Option("--no-reuse", help="Run every step, also those whose outputs Kubeflow has in its cache.")
]
ServiceAccount = Annotated[
    str, typer.Option(help="Kubernetes service account of the run's pods.", show_default="Kubeflow's default")
]
Pipeline = Annotated[
    Path | None,
    typer.Option(help="Compiled pipeline.", show_default="the one in pipelines/compiled for this file"),
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
        from skd_kfp.pipelines.kubeflow.api import KubeflowPipelines
        from skd_kfp.pipelines.kubeflow.auth import find_credentials

        if not _is_url(self.host):
            raise SkdError(
                "no URL of Kubeflow Pipelines" if not self.host else "not a URL",
                where=shown(self.host) or "--host",
                hint="give --host https://... or set KF_PIPELINES_ENDPOINT",
            )
        credentials = find_credentials(self.auth, self.host, self.audience)
        return KubeflowPipelines(self.host, credentials, self.namespace, notice=_notice)

    def link(self, kind: str, identifier: str) -> str:
        """The page of a run (`runs`) or a recurring run (`recurringrun`)."""
        return f"{shown(self.ui_host or self.host).rstrip('/')}/#/{kind}/details/{identifier}"


def _notice(text: str) -> None:
    say(f"note: {text}", err=True)


def _is_url(host: str) -> bool:
    try:
        url = urlsplit(host)
        return url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
    except ValueError:  # a port that is none
        return False


def check_names(name: str, experiment: str, mlflow_experiment: str, settings: str) -> None:
    """Check what people call things, before the server is asked for anything.

    Raises:
        SkdError: a name could not be one.
    """
    from skd_lib._core.ascii_json import may_be_changed
    from skd_lib.config.names import check_experiment, check_line, checked

    if name:
        checked("--name", check_line, name)
    checked("--experiment", check_experiment, experiment)
    if mlflow_experiment:
        checked("--mlflow-experiment", check_experiment, mlflow_experiment)
    for option, text in {"--name": name, "--experiment": experiment}.items():
        # Kubeflow's database keeps three bytes a character; the name of a run is also an argument of its pods.
        if max(map(ord, text), default=0) > 0xFFFF or (option == "--name" and may_be_changed(text)):
            what = "Kubeflow cannot keep it: it holds an emoji or the like, a $, {{ or }}"
            raise SkdError(what, where=f"{option} {text}", hint="choose another name")
    if not re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", settings) or settings in VOLUMES:
        hint = "at most 63 lower case letters, digits and dashes, e.g. skd-settings"
        what = f"{settings!r} is no name for the ConfigMap: it is mounted as a volume of that name"
        raise SkdError(what, where="--settings", hint=hint)


def submit(
    config: Annotated[Path, typer.Argument(help="The YAML file of a run, or of a comparison.")],
    changes: Set = None,
    host: Host = "",
    wait: Annotated[
        bool,
        typer.Option("--wait", help="Follow the run to its end; exit code 1 if it fails, 3 if it is cancelled."),
    ] = False,
    recurring: Annotated[
        str | None, typer.Option(metavar="CRON", help='Run it on a schedule instead, e.g. "0 3 * * *" (UTC).')
    ] = None,
    name: Annotated[str, typer.Option(help="Name of the run.", show_default="the config's, and the time")] = "",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check the config, say what would run, and stop.")] = False,
    auth: AuthKind = Auth.AUTO,
    audience: Audience = "",
    namespace: Namespace = "",
    experiment: Experiment = "skd",
    mlflow_experiment: MlflowExperiment = "",
    settings: Settings = "skd-settings",
    pipeline_root: PipelineRoot = "",
    no_reuse: NoReuse = False,
    service_account: ServiceAccount = "",
    pipeline: Pipeline = None,
    ui_host: UiHost = "",
) -> None:
    """Run the pipeline in Kubeflow; for a comparison's file the pipeline `compare_methods`.

    The compiled pipeline is uploaded where the server does not have it yet. With --wait Ctrl-C ends the waiting, not
    the run.
    """
    from skd_kfp.pipelines.compiling import compiled_path, pipeline_for
    from skd_kfp.pipelines.kubeflow.schedules import described, with_seconds
    from skd_kfp.pipelines.kubeflow.submit import Package, Submission, Target
    from skd_lib.comparison.config import is_comparison, load_compare
    from skd_lib.comparison.plan import plan
    from skd_lib.config import load_config, parse_overrides

    check_names(name, experiment, mlflow_experiment, settings)
    if recurring is not None:
        with_seconds(recurring)  # before anything is uploaded
        if wait:
            raise SkdError("a recurring run has no end", where="--wait", hint="leave out --wait or --recurring")
    overrides = parse_overrides(changes or ())
    comparison = plan(*load_compare(config, overrides), where=str(config)) if is_comparison(config) else None
    run_config = comparison.base if comparison else load_config(config, overrides)
    package = Package.read(pipeline or compiled_path("compare_methods" if comparison else pipeline_for(run_config)))
    target = Target(experiment, mlflow_experiment, settings, pipeline_root, service_account, reuse=not no_reuse)
    # A recurring run is found again by its name, which therefore holds no time.
    chosen = name or (run_config.name if recurring is not None else "")
    submission = Submission.plan(run_config, package, target, chosen, comparison)
    schedule = {} if recurring is None else {"schedule": described(recurring)}
    for what, value in {**submission.describe(), **schedule}.items():
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
    run = submission.start(api, submission.prepare(api))
    say(server.link("runs", run.run_id))
    if wait:
        _wait(api, run.run_id, submission.package.documents[0])


def _wait(api: KubeflowPipelines, run_id: str, spec: dict[str, Any]) -> None:
    from skd_kfp.pipelines.graph import read_steps
    from skd_kfp.pipelines.kubeflow.follow import ending, follow

    try:
        followed = follow(api, run_id, spec, read_steps(spec), say)
    except KeyboardInterrupt as interruption:
        say("\nno longer waiting; the run goes on in the cluster", err=True)
        raise typer.Exit(INTERRUPTED) from interruption
    whole, *parts = ending(followed, api.namespace)
    if followed.succeeded:
        say("\n".join([whole, *(f"note: {part}" for part in parts)]))
        return
    say(whole if followed.cancelled else f"error: {whole}", err=True)
    for part in parts:
        say(f"- {part}", err=True)
    raise typer.Exit(CANCELLED if followed.cancelled else FAILED)
