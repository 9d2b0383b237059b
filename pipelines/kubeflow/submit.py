"""Submit a configuration as a run, or as a schedule of runs, to Kubeflow Pipelines."""

from __future__ import annotations

import math
import re
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import kfp_server_api

from skd_kfp.components.images import COMET, TRAIN
from skd_kfp.pipelines.compiling import Documents, compiled_path, images_of, profile_of
from skd_kfp.pipelines.kubeflow.api import KubeflowPipelines
from skd_kfp.pipelines.kubeflow.checks import (
    NEEDS_ROOT,
    check_version,
    out_of_reach,
    schedule_notice,
    wants_nodes,
    with_seconds,
    wrong_root,
)
from skd_kfp.pipelines.kubeflow.sizes import expected, measure, notice, too_large
from skd_lib import __version__
from skd_lib._core.documents import parse_yaml_documents, read_text
from skd_lib.comparison import plan as comparisons
from skd_lib.comparison.plan import Plan, check_fits_cluster
from skd_lib.config import RunConfig
from skd_lib.config.parameters import to_parameters
from skd_lib.data.prepared import digest
from skd_lib.errors import SkdError, SkdErrors

SHORT_DIGEST = 12
SETTINGS = "skd-settings"
"""ConfigMap that holds a namespace's places of MLflow and checkpoints."""
REASON_LENGTH = 120
"""A description fits into 255 bytes, as some databases of Kubeflow keep no more of it."""
NO_COMET = "this pipeline has no step for it, and no scores by it"
NO_SCORES = "comparisons have no scores by it"
NO_DIGEST = "no digest: is it in your registry? see `skd compile --image`"
NOT_RELEASED = (
    "no digest, since this is no release: build and push an image, then "
    "`skd compile --image REGISTRY/NAME@sha256:... --output FILE` and `skd submit --pipeline FILE`"
)
WITH_COMET = "give --pipeline a file of `skd compile --pipeline distillation_comet`"


@dataclass(frozen=True)
class Package:
    """A compiled pipeline.

    `digest` is the hex sha256 of the content, without comments, the order of keys and the KFP version that compiled it.
    """

    path: Path
    documents: Documents
    digest: str

    @classmethod
    def read(cls, path: Path | None = None) -> Package:
        """Read a compiled pipeline, by default the one of this package."""
        path = path or compiled_path()
        if not path.exists():
            raise SkdError("there is no compiled pipeline", where=str(path), hint="run `skd compile`")
        documents = parse_yaml_documents(read_text(path), where=str(path))
        if not documents or not isinstance(documents[0], dict) or "pipelineInfo" not in documents[0]:
            raise SkdError("not a compiled pipeline", where=str(path), hint="make one with `skd compile --output`")
        content = [{key: value for key, value in document.items() if key != "sdkVersion"} for document in documents]
        return cls(path, documents, digest(content))

    @property
    def images(self) -> str:
        """The images of the steps, with a remark on those that are named without a digest."""
        remarks = dict.fromkeys((TRAIN, COMET), NOT_RELEASED)
        return ", ".join(
            image if "@sha256:" in image else f"{image} ({remarks.get(image, NO_DIGEST)})"
            for image in images_of(self.documents)
        )

    @property
    def name(self) -> str:
        """The pipeline's name."""
        return str(self.documents[0]["pipelineInfo"]["name"])

    @property
    def version(self) -> str:
        """The version's name in Kubeflow: the project's version, the profile, COMET, and a digest of the content.

        It is the same where the content is, so that it is uploaded once.
        """
        profile = re.sub(r"[^a-z0-9]+", "-", profile_of(self.documents).lower()).strip("-")
        comet = "comet" if self.has_comet else ""
        return "-".join(part for part in (__version__, profile, comet, self.digest[:SHORT_DIGEST]) if part)

    @property
    def has_comet(self) -> bool:
        """True if a step computes COMET."""
        return "comp-comet-score" in self.documents[0]["components"]


@dataclass(frozen=True)
class Target:
    """The places of a run and its outputs.

    What is empty is as the ConfigMap `settings` says, which need not exist, else Kubeflow's own default.
    """

    experiment: str = "skd"
    mlflow_experiment: str = ""
    settings: str = SETTINGS
    pipeline_root: str = ""
    service_account: str = ""
    reuse: bool = True


@dataclass(frozen=True)
class Submission:
    """Everything about a run, decided and checked before the first request to the server."""

    name: str
    package: Package
    target: Target
    parameters: Mapping[str, Any]
    notices: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def plan(
        cls, config: RunConfig, package: Package, target: Target, name: str = "", comparison: Plan | None = None
    ) -> Submission:
        """Plan a run of `config`, or of a comparison that starts from it, by default named after it and the time."""
        parameters = {
            **(comparisons.to_parameters(comparison.compare, comparison.base) if comparison else to_parameters(config)),
            "mlflow_experiment": target.mlflow_experiment,
            "settings": target.settings,
            "reuse": target.reuse,
        }
        known = package.documents[0]["root"].get("inputDefinitions", {}).get("parameters", {})
        if ("comparison" in known) != (comparison is not None):
            kinds = ("a run", "a comparison") if comparison is None else ("a comparison", "a run")
            what = f"the file is that of {kinds[0]}, and this pipeline is for {kinds[1]}"
            raise SkdError(what, where=str(package.path), hint="leave out --pipeline, or give another one")
        if unknown := sorted(parameters.keys() - known.keys()):
            what = f"the pipeline has no parameter `{unknown[0]}`"
            raise SkdError(what, where=str(package.path), hint="compile it again")
        if comparison:
            check_fits_cluster(comparison, where=config.name)
        runs = [trial.config(config) for trial in comparison.trials] if comparison else [config]
        problems = [*out_of_reach(config, runs), *wrong_root(target.pipeline_root, runs)]
        lacks_comet = config.task.wants_comet and not package.has_comet
        if lacks_comet and not comparison and config.task.metrics[0] == "comet":
            what = "COMET is to decide, and this pipeline has no step for it"
            problems.append(SkdError(what, where="task.metrics", hint=f"{WITH_COMET}, or put another metric first"))
        # With the manifests of 2.17.0; the server's are not known here.
        sizes = measure(package.documents, parameters, expected(config, comparison), wrapped=True)
        problems += too_large(sizes)
        if problems:
            raise SkdErrors(problems)
        trains_elsewhere = any(wants_nodes(run) for run in runs) and not target.pipeline_root
        said = {
            "runs": f"{len(comparison.trials)}, see `skd compare FILE --dry-run`" if comparison else "",
            "multinode": NEEDS_ROOT if trains_elsewhere else "",
            "size": notice(sizes),
            "COMET": "" if not lacks_comet else NO_SCORES if comparison else f"{NO_COMET}: {WITH_COMET}",
        }
        shown_name = name or f"{config.name}-{datetime.now(UTC):%Y%m%d-%H%M%S}"
        return cls(shown_name, package, target, parameters, {key: text for key, text in said.items() if text})

    def describe(self) -> dict[str, str]:
        """Return a description of the run for a person."""
        target = self.target
        as_said = f"as the ConfigMap {target.settings} says, if there is one"
        default_root = (
            "Kubeflow's default, its own small volume unless an administrator has set another: "
            "give --pipeline-root for models of more than a few GB"
        )
        return {
            "run": self.name,
            "pipeline": f"{self.package.name}, version {self.package.version}",
            "images": self.package.images,
            "experiment": target.experiment,
            "MLflow": f"{as_said}{f'; experiment {target.mlflow_experiment}' if target.mlflow_experiment else ''}",
            "checkpoints": as_said,
            "artifacts": target.pipeline_root or default_root,
            "cache": "used" if target.reuse else "not used: every step runs",
            **self.notices,
        }

    def prepare(self, api: KubeflowPipelines, reason: str = "skd submit") -> Any:
        """Return the run to create, with `reason` in its description; creates its experiment and pipeline version."""
        _tell(api, check_version(api.version(), api.host))
        return kfp_server_api.V2beta1Run(
            display_name=self.name, description=self._description(reason), **self._body(api)
        )

    def start(self, api: KubeflowPipelines, run: Any, before: float = math.inf) -> Any:
        """Create a run that was prepared, and check that the server keeps what was requested."""
        made = api.create_run(run, before)
        try:
            differing = run_differences(run, api.run(made.run_id))
        except SkdError as error:  # it runs anyway
            _tell(api, f"run {made.run_id} has started, and could not be compared with what was asked: {error.brief}")
            return made
        if differing:
            _tell(
                api,
                f"run {made.run_id} has started, but the server changed {' and '.join(differing)}: "
                "compare them on Kubeflow's page, and stop the run if that matters",
            )
        return made

    def schedule(self, api: KubeflowPipelines, cron: str) -> Any:
        """Create a recurring run of this name, or find the existing one.

        `cron` has five fields as in crontab, or six with seconds first; UTC. Raises SkdError where an existing one of
        this name differs, or the server keeps something else.
        """
        version = api.version()
        _tell(api, check_version(version, api.host))
        wanted = kfp_server_api.V2beta1RecurringRun(
            display_name=self.name,
            description=self._description("skd submit --recurring"),
            mode=kfp_server_api.RecurringRunMode.ENABLE,
            trigger=kfp_server_api.V2beta1Trigger(
                cron_schedule=kfp_server_api.V2beta1CronSchedule(cron=with_seconds(cron))
            ),
            max_concurrency="1",
            no_catchup=True,
            **self._body(api),
        )
        there = api.recurring_runs_named(self.name, wanted.experiment_id)
        for found in there:
            if not recurring_differences(wanted, found):
                return found
        if there:
            raise SkdError(
                "there is a recurring run of this name that differs in "
                f"{' and '.join(recurring_differences(wanted, there[0]))}",
                where=self.name,
                hint=f"delete {there[0].recurring_run_id} in Kubeflow's page first, or give another --name",
            )
        made = api.recurring_run(api.create_recurring_run(wanted).recurring_run_id)
        differing = recurring_differences(wanted, made)
        if differing:
            raise SkdError(
                f"recurring run {made.recurring_run_id} was made, but the server changed {' and '.join(differing)}",
                where=self.name,
                hint="delete it in Kubeflow's page",
            )
        _tell(api, schedule_notice(version))
        return made

    def _description(self, reason: str) -> str:
        """Return why a run was made, and a word that only this submission has.

        The word identifies the run as ours if the answer to its creation is lost; it must not be cut off.
        """
        short = reason.encode("ascii", "replace").decode()
        if len(short) > REASON_LENGTH:
            short = f"{short[: REASON_LENGTH // 3]}...{short[3 - 2 * REASON_LENGTH // 3 :]}"
        return f"{short}; submission {uuid.uuid4().hex}; pipeline sha256:{self.package.digest}"

    def _body(self, api: KubeflowPipelines) -> dict[str, Any]:
        """Return the common part of runs and recurring runs; creates the experiment and the version where needed."""
        version = api.pipeline_version(
            self.package.name, self.package.version, self.package.path, f"sha256:{self.package.digest}"
        )
        return {
            "experiment_id": api.experiment(self.target.experiment),
            "pipeline_version_reference": kfp_server_api.V2beta1PipelineVersionReference(
                pipeline_id=version.pipeline_id, pipeline_version_id=version.pipeline_version_id
            ),
            "runtime_config": kfp_server_api.V2beta1RuntimeConfig(
                parameters=dict(self.parameters), pipeline_root=self.target.pipeline_root or None
            ),
            "service_account": self.target.service_account or None,
        }


def _tell(api: KubeflowPipelines, notice: str) -> None:
    if notice:
        api.notice(notice)


def run_differences(wanted: Any, kept: Any) -> list[str]:
    """Return the parts of a run that the server keeps differently, as text; its own defaults are no difference."""
    asked, has = wanted.runtime_config, _field(kept, "runtime_config")
    parameters: Mapping[str, Any] = _field(has, "parameters") or {}
    changed = sorted(
        name for name, value in asked.parameters.items() if name not in parameters or parameters[name] != value
    )
    version = ("pipeline_version_reference", "pipeline_version_id")
    root, account = asked.pipeline_root, wanted.service_account
    differing = {
        "its pipeline": _field(kept, *version) != _field(wanted, *version),
        f"its parameters {', '.join(changed)}": bool(changed),
        "where artifacts go": bool(root) and _field(has, "pipeline_root") != root,
        "its service account": bool(account) and kept.service_account != account,
    }
    return [part for part, differs in differing.items() if differs]


def recurring_differences(wanted: Any, kept: Any) -> list[str]:
    """Return the parts of a recurring run that the server keeps differently, as text."""
    cron = ("trigger", "cron_schedule", "cron")
    differing = {
        "its schedule": _field(kept, *cron) != _field(wanted, *cron),
        "being switched off": kept.mode == "DISABLE",
    }
    return [part for part, differs in differing.items() if differs] + run_differences(wanted, kept)


def _field(value: Any, *names: str) -> Any:
    """Return a field of a field; None where one of them is missing."""
    for name in names:
        value = getattr(value, name, None)
    return value
