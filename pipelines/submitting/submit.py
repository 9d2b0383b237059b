"""From a configuration to a run in Kubeflow Pipelines."""

from __future__ import annotations

import re
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pipelines.compiling import Documents, compiled_path
from pipelines.submitting.api import KubeflowPipelines
from skd_lib.config import FilesSource, RunConfig
from skd_lib.data.manifest import digest
from skd_lib.documents import parse_yaml_documents, read_text
from skd_lib.errors import SkdError, SkdErrors
from skd_lib.parameters import to_parameters
from skd_lib.storage import is_remote
from skd_lib.uris import holds_secret, shown

SHORT_DIGEST = 12
CRON_FIELDS = 6


@dataclass(frozen=True)
class Package:
    """A compiled pipeline.

    Attributes:
        path: Its file.
        documents: What is in it.
        digest: Hex sha256 of that, whatever the order of its keys, its comments and the KFP version that compiled it.
    """

    path: Path
    documents: Documents
    digest: str

    @classmethod
    def read(cls, path: Path | None = None) -> Package:
        """Read a compiled pipeline, by default the one of this package.

        Raises:
            SkdError: the file is missing, or is no compiled pipeline.
        """
        path = path or compiled_path()
        if not path.exists():
            raise SkdError("there is no compiled pipeline", where=str(path), hint="run `skd compile`")
        documents = parse_yaml_documents(read_text(path), where=str(path))
        if not documents or not isinstance(documents[0], dict) or "pipelineInfo" not in documents[0]:
            raise SkdError("not a compiled pipeline", where=str(path), hint="make one with `skd compile --output`")
        content = [{key: value for key, value in document.items() if key != "sdkVersion"} for document in documents]
        return cls(path, documents, digest(content))

    @property
    def name(self) -> str:
        """The pipeline's name."""
        return str(self.documents[0]["pipelineInfo"]["name"])

    @property
    def version(self) -> str:
        """The version's name in Kubeflow: it is the same where the content is, so that it is uploaded once."""
        return f"{self.name}-{self.digest[:SHORT_DIGEST]}"


@dataclass(frozen=True)
class Place:
    """Where runs go.

    Attributes:
        experiment: Experiment, in Kubeflow and in MLflow.
        tracking_uri: MLflow tracking server; empty turns tracking off.
        checkpoint_root: Where training keeps checkpoints; empty: they are lost with the pod.
        pipeline_root: Where Kubeflow keeps artifacts; empty: its own default.
        service_account: Kubernetes service account of the run's pods; empty: its own default.
    """

    experiment: str = "skd"
    tracking_uri: str = ""
    checkpoint_root: str = ""
    pipeline_root: str = ""
    service_account: str = ""


@dataclass(frozen=True)
class Submission:
    """Everything that makes a run, settled before the server is asked for anything."""

    name: str
    package: Package
    place: Place
    parameters: Mapping[str, Any]

    @classmethod
    def plan(cls, config: RunConfig, package: Package, place: Place, name: str = "") -> Submission:
        """Settle a run of `config`, by default named after it and the time.

        Raises:
            SkdErrors: the run could not work in a cluster.
        """
        parameters = {
            **to_parameters(config),
            "tracking_uri": place.tracking_uri,
            "experiment": place.experiment,
            "checkpoint_root": place.checkpoint_root,
        }
        known = package.documents[0]["root"].get("inputDefinitions", {}).get("parameters", {})
        problems = [
            SkdError(f"the pipeline has no parameter `{parameter}`", where=str(package.path), hint="compile it anew")
            for parameter in sorted(parameters.keys() - known.keys())
        ]
        source = config.data.source
        files = [*source.train, *source.validation, *source.test] if isinstance(source, FilesSource) else []
        problems += [
            SkdError("the cluster cannot read a file of this machine", where=file, hint="copy it to gs://")
            for file in files
            if not is_remote(file) and not Path(file).is_absolute()  # an absolute path may be a mounted volume's
        ]
        if holds_secret(place.tracking_uri):
            what = "the tracking URI holds a password, which Kubeflow shows to all who may see the run"
            hint = "leave it out of the URI, and put it into the Secret `skd-mlflow`, from which steps get it"
            problems.append(SkdError(what, where=shown(place.tracking_uri), hint=hint))
        if problems:
            raise SkdErrors(problems)
        return cls(name or f"{config.name}-{datetime.now(UTC):%Y%m%d-%H%M%S}", package, place, parameters)

    def describe(self) -> dict[str, str]:
        """What will be made, for a person."""
        return {
            "run": self.name,
            "pipeline": f"{self.package.name}, version {self.package.version}",
            "experiment": self.place.experiment,
            "MLflow": shown(self.place.tracking_uri) or "off",
            "checkpoints": self.place.checkpoint_root or "lost with the pod",
        }

    def prepare(self, api: KubeflowPipelines, reason: str = "skd submit") -> Any:
        """The run to be created, with its experiment and the pipeline's version made; `reason` is in its description.

        Raises:
            SkdError: the server cannot be reached or refuses.
        """
        import kfp_server_api

        # By the last word of its description a run is known as ours, should the answer to its creation get lost.
        origin = f"{reason}; pipeline sha256:{self.package.digest}; submission {uuid.uuid4().hex}"
        return kfp_server_api.V2beta1Run(display_name=self.name, description=origin, **self._body(api))

    def schedule(self, api: KubeflowPipelines, cron: str) -> Any:
        """Make a recurring run of this name, or find the one that is there.

        Args:
            api: The server.
            cron: When: five fields as in crontab, or six with seconds first; UTC.

        Raises:
            SkdError: there is one of this name that does something else, or the server cannot be reached or refuses.
        """
        import kfp_server_api

        wanted = kfp_server_api.V2beta1RecurringRun(
            display_name=self.name,
            description=f"skd submit --recurring; pipeline sha256:{self.package.digest}",
            mode=kfp_server_api.RecurringRunMode.ENABLE,
            trigger=kfp_server_api.V2beta1Trigger(
                cron_schedule=kfp_server_api.V2beta1CronSchedule(cron=with_seconds(cron))
            ),
            max_concurrency="1",
            no_catchup=True,
            **self._body(api),
        )
        made = api.recurring_run(wanted)
        differing = [
            what
            for what, ours, theirs in (
                ("its schedule", wanted.trigger.cron_schedule.cron, made.trigger.cron_schedule.cron),
                ("its pipeline", wanted.description, made.description),
                ("its parameters", wanted.runtime_config.parameters, made.runtime_config.parameters),
            )
            if ours != theirs
        ]
        if differing:
            raise SkdError(
                f"there is a recurring run of this name that differs in {' and '.join(differing)}",
                where=self.name,
                hint=f"delete {made.recurring_run_id} in Kubeflow's page first, or give another --name",
            )
        return made

    def _body(self, api: KubeflowPipelines) -> dict[str, Any]:
        """What single and recurring runs have in common; makes the experiment and the version where needed."""
        import kfp_server_api

        version = api.pipeline_version(
            self.package.name, self.package.version, self.package.path, f"sha256:{self.package.digest}"
        )
        return {
            "experiment_id": api.experiment(self.place.experiment),
            "pipeline_version_reference": kfp_server_api.V2beta1PipelineVersionReference(
                pipeline_id=version.pipeline_id, pipeline_version_id=version.pipeline_version_id
            ),
            "runtime_config": kfp_server_api.V2beta1RuntimeConfig(
                parameters=dict(self.parameters), pipeline_root=self.place.pipeline_root or None
            ),
            "service_account": self.place.service_account or None,
        }


_CRON = (
    ("second", 0, 59, ()),
    ("minute", 0, 59, ()),
    ("hour", 0, 23, ()),
    ("day of the month", 1, 31, ()),
    ("month", 1, 12, ("JAN", "FEB", "MAR", "APR", "MAY", "JUN", "JUL", "AUG", "SEP", "OCT", "NOV", "DEC")),
    ("day of the week", 0, 6, ("SUN", "MON", "TUE", "WED", "THU", "FRI", "SAT")),
)
"""Of each field its name, its least and greatest value, and names of values."""


def with_seconds(cron: str) -> str:
    """Return a schedule as Kubeflow wants it, with six fields.

    Raises:
        SkdError: it has neither five fields nor six, or one of them is none of a schedule.
    """
    fields = cron.split()
    if len(fields) == CRON_FIELDS - 1:
        fields = ["0", *fields]
    if len(fields) != CRON_FIELDS:
        hint = 'e.g. "0 3 * * *" for three o\'clock every night (UTC)'
        raise SkdError(f"a schedule has 5 fields, or 6 with seconds first, not {len(fields)}", where=cron, hint=hint)
    for text, (name, least, greatest, names) in zip(fields, _CRON, strict=True):
        if not all(_is_range(part, least, greatest, names) for part in text.split(",")):
            hint = f"numbers from {least} to {greatest}, e.g. {least}, {least}-{greatest}, */{greatest // 2}, or *"
            raise SkdError(f"`{text}` is no {name}", where=cron, hint=hint)
    return " ".join(fields)


def _is_range(text: str, least: int, greatest: int, names: Sequence[str]) -> bool:
    """Whether a part of a field is `*`, a value, or `FIRST-LAST`, each maybe with `/STEP`."""
    span, slash, step = text.partition("/")
    if slash and not (re.fullmatch("[0-9]{1,3}", step) and int(step) > 0):
        return False
    if span in ("*", "?"):
        return True
    ends = [names.index(end.upper()) + least if end.upper() in names else _number(end) for end in span.split("-")]
    return len(ends) <= 2 and all(least <= end <= greatest for end in ends) and ends == sorted(ends)


def _number(text: str) -> int:
    return int(text) if re.fullmatch("[0-9]{1,3}", text) else -1
