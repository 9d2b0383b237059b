"""Options that several commands share: each is defined once."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import urlsplit

import typer
from pydantic_core import from_json, to_json

from skd_kfp.pipelines.kubeflow.auth import Auth
from skd_lib._core.terminal import say
from skd_lib._core.uris import default_store, shown
from skd_lib.errors import SkdError
from skd_lib.steps.environment import VOLUMES

if TYPE_CHECKING:
    from skd_kfp.pipelines.kubeflow.api import KubeflowPipelines
    from skd_kfp.pipelines.kubeflow.submit import Target

RunsDir = Annotated[Path, typer.Option(help="Where runs keep their files.")]
TrackingUri = Annotated[
    str | None,
    typer.Option(
        envvar="MLFLOW_TRACKING_URI", help="MLflow tracking server.", show_default="sqlite:///RUNS_DIR/mlflow.db"
    ),
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="FIELD=VALUE",
        help="Another value than the file's, e.g. distill.sampling.top_k=5; null unsets a field. Repeatable.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead, for scripts.")]


def _named(option: typer.CallbackParam, image: str | None) -> str | None:
    """Refuse an empty name, e.g. of an unset variable of a shell, which would select the release's image."""
    if image is not None and not image.strip():
        hint = "name an image, or leave the option out for the release's (a clone has none)"
        raise SkdError("no image is named", where=option.opts[0], hint=hint)
    return image


Image = Annotated[
    str | None,
    typer.Option(
        envvar="SKD_IMAGE",
        help="Run every step but COMET's in this image, not in that of the release (a clone has none).",
        callback=_named,
    ),
]
CometImage = Annotated[
    str | None,
    typer.Option(
        envvar="SKD_COMET_IMAGE",
        help="Run COMET's step in this image, not in that of the release (a clone has none).",
        callback=_named,
    ),
]


@dataclass(frozen=True)
class Local:
    """Options of the commands that run a pipeline on this machine."""

    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check the config, print the plan and stop.")] = False
    fresh: Annotated[bool, typer.Option("--fresh", help="Forget finished steps and checkpoints, start over.")] = False
    runs_dir: RunsDir = Path("runs")
    tracking_uri: Annotated[
        str | None,
        typer.Option(
            envvar="MLFLOW_TRACKING_URI",
            help="MLflow tracking server; empty turns tracking off.",
            show_default="sqlite:///RUNS_DIR/mlflow.db",
        ),
    ] = None
    experiment: Annotated[str, typer.Option(envvar="MLFLOW_EXPERIMENT_NAME", help="MLflow experiment.")] = "skd"

    def check(self) -> None:
        """Check the experiment's name."""
        from skd_lib.config.names import check_experiment, checked

        checked("--experiment", check_experiment, self.experiment)

    @property
    def store(self) -> str:
        """The URI of MLflow; empty where tracking is off."""
        return default_store(self.runs_dir) if self.tracking_uri is None else self.tracking_uri


@dataclass(frozen=True)
class Cluster:
    """Options of the commands that start runs in Kubeflow."""

    host: Annotated[
        str,
        typer.Option(
            envvar="KF_PIPELINES_ENDPOINT",
            help="API of Kubeflow Pipelines, e.g. https://kubeflow.example.com/pipeline.",
        ),
    ] = ""
    auth: Annotated[
        Auth,
        typer.Option(
            help="Credentials: the service account's token, an OpenID Connect token (SKD_KFP_TOKEN, "
            "SKD_KFP_TOKEN_FILE, or Google's for --audience) or Dex's session cookie (SKD_KFP_COOKIE, "
            "SKD_KFP_COOKIE_FILE); auto takes the first that is there."
        ),
    ] = Auth.AUTO
    audience: Annotated[str, typer.Option(help="Audience of id-tokens: Identity-Aware Proxy's OAuth client.")] = ""
    namespace: Annotated[str, typer.Option(help="Profile, in a multi-user Kubeflow.", show_default="none")] = ""
    experiment: Annotated[str, typer.Option(help="Experiment in Kubeflow.")] = "skd"
    mlflow_experiment: Annotated[
        str, typer.Option(help="Experiment in MLflow.", show_default="as the ConfigMap of --settings says")
    ] = ""
    settings: Annotated[
        str,
        typer.Option(
            help="ConfigMap in the run's namespace that says where MLflow and checkpoints are; it need not exist."
        ),
    ] = "skd-settings"
    pipeline_root: Annotated[
        str,
        typer.Option(
            envvar="SKD_PIPELINE_ROOT",
            help="Where Kubeflow keeps artifacts, e.g. gs://...",
            show_default="its own default",
        ),
    ] = ""
    no_reuse: Annotated[
        bool, typer.Option("--no-reuse", help="Run every step, also those whose outputs Kubeflow has in its cache.")
    ] = False
    service_account: Annotated[
        str, typer.Option(help="Kubernetes service account of the run's pods.", show_default="Kubeflow's default")
    ] = ""
    pipeline: Annotated[
        Path | None,
        typer.Option(help="Compiled pipeline.", show_default="the one in pipelines/compiled for this file"),
    ] = None
    ui_host: Annotated[
        str,
        typer.Option(envvar="KF_PIPELINES_UI_ENDPOINT", help="Kubeflow's page, for links.", show_default="HOST"),
    ] = ""

    def check(self, name: str = "") -> None:
        """Check the names that people choose, before the first request to the server."""
        from skd_lib._core.ascii_json import may_be_changed
        from skd_lib.config.names import check_experiment, check_line, checked

        if name:
            checked("--name", check_line, name)
        checked("--experiment", check_experiment, self.experiment)
        if self.mlflow_experiment:
            checked("--mlflow-experiment", check_experiment, self.mlflow_experiment)
        for option, text in {"--name": name, "--experiment": self.experiment}.items():
            # Kubeflow's database keeps three bytes a character; the name of a run is also an argument of its pods.
            if max(map(ord, text), default=0) > 0xFFFF or (option == "--name" and may_be_changed(text)):
                what = "Kubeflow cannot keep it: it holds an emoji or the like, a $, {{ or }}"
                raise SkdError(what, where=f"{option} {text}", hint="choose another name")
        if not re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", self.settings) or self.settings in VOLUMES:
            hint = "at most 63 lower case letters, digits and dashes, e.g. skd-settings"
            what = f"{self.settings!r} is no name for the ConfigMap: it is mounted as a volume of that name"
            raise SkdError(what, where="--settings", hint=hint)

    @property
    def target(self) -> Target:
        """The places of a run and its outputs."""
        from skd_kfp.pipelines.kubeflow.submit import Target

        return Target(
            self.experiment,
            self.mlflow_experiment,
            self.settings,
            self.pipeline_root,
            self.service_account,
            reuse=not self.no_reuse,
        )

    def connect(self) -> KubeflowPipelines:
        """Return the server's API; raise SkdError where the host or the credentials are missing."""
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
        """Return the page of a run (`runs`) or a recurring run (`recurringrun`)."""
        return f"{shown(self.ui_host or self.host).rstrip('/')}/#/{kind}/details/{identifier}"


def expanded(command: Callable[..., None]) -> Callable[..., None]:
    """Replace each argument of a command that is a dataclass by the dataclass's fields."""
    own = inspect.signature(command, eval_str=True)
    groups: dict[str, Any] = {
        name: parameter.annotation
        for name, parameter in own.parameters.items()
        if dataclasses.is_dataclass(parameter.annotation)
    }
    fields = {name: inspect.signature(group, eval_str=True).parameters for name, group in groups.items()}

    @functools.wraps(command)
    def call(**values: Any) -> None:
        made = {name: group(**{each: values.pop(each) for each in fields[name]}) for name, group in groups.items()}
        command(**values, **made)

    parameters = [
        each.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        for name, parameter in own.parameters.items()
        for each in (fields[name].values() if name in groups else [parameter])
    ]
    call.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
    call.__annotations__ = {each.name: each.annotation for each in parameters}
    return call


def refuse(context: typer.Context, *names: str, why: str, hint: str = "leave it out") -> None:
    """Raise SkdError for options without effect; in the environment they may be meant for other commands."""
    for name in names:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            raise SkdError(f"it has no effect: {why}", where=f"--{name.replace('_', '-')}", hint=hint)


def say_json(value: object, *, lines: bool = False) -> None:
    """Print a value as JSON, for scripts; numbers that JSON does not have (NaN, infinity) become null."""
    finite = from_json(to_json(value, inf_nan_mode="null"))
    say(json.dumps(finite, indent=None if lines else 2))


def show_progress() -> None:
    """Write the progress of long work to standard error, a line every ten seconds."""
    from skd_lib._core import events

    events.log.setLevel(logging.INFO)
    if logging.lastResort is not None:  # Python's handler of warnings, where a program sets up none
        logging.lastResort.setLevel(logging.INFO)


def short(path: Path) -> str:
    """Return the path relative to the current folder, where that is shorter."""
    try:
        return str(path.absolute().relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def _notice(text: str) -> None:
    say(f"note: {text}", err=True)


def _is_url(host: str) -> bool:
    try:
        url = urlsplit(host)
        return url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
    except ValueError:  # a wrong port
        return False
