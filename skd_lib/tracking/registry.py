"""The registered students: one version for each set of weights, found again by their digest.

A version points at the weights by URI; the weights themselves are never sent through the tracking server. The alias
`challenger` is the student registered last, `champion` the best one that passed the gate. What a reader needs stands in
the version's tags: lineage, the task's scores and the figures as a draft, as they were when it was registered.
"""

from __future__ import annotations

import logging
import os
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from skd_lib._core.events import Progress
from skd_lib._core.uris import shown
from skd_lib.errors import SkdError
from skd_lib.tracking.champions import CHALLENGER, CHAMPION, aliased, crown
from skd_lib.tracking.client import brief, connect, is_local_store, is_silence, unanswered
from skd_lib.tracking.locate import get_run

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger(__name__)
T = TypeVar("T")
_ATTEMPTS = 4
WAIT_VARIABLE = "SKD_REGISTRY_WAIT"
"""Seconds for which a step that needs the registry waits for it, 300 unless set."""
_LONGEST_PAUSE = 15.0

DIGEST_TAG = "weights_sha256"
URI_TAG = "weights_uri"
FIGURE_PREFIX = "figure."
SIGNATURE_PREFIX = "signature."
FINGERPRINT_TAG = "data_fingerprint"
PIPELINE_RUN_TAG = "pipeline_run_id"
"""Holds Kubeflow's run that trained the student."""
REGISTERED_BY_TAG = "registered_by"
"""Holds Kubeflow's run that registered it first: another one, where that took the student from the cache."""
GATE_TAG = "gate"


class Silent(SkdError):
    """The registry does not answer now, and may do so later."""


@dataclass(frozen=True)
class Champion:
    """The version that has the alias `champion`, and where its weights are."""

    version: str
    weights_uri: str
    weights_sha256: str


def register(
    *,
    tracking_uri: str,
    model_name: str,
    student_uri: str,
    weights_sha256: str,
    run_id: str | Callable[[], str],
    trained_by: str = "",
    promote: bool,
    figures: Mapping[str, float],
    tags: Mapping[str, str],
    description: str = "",
    patience: float = 0.0,
) -> str:
    """Register a student, or find the version that has these very weights, and set the aliases.

    Idempotent, and safe when two processes register the same weights: versions are numbered in the order in which
    they are made, so the later of two sees the earlier and withdraws. Tags are those of the latest call.

    Args:
        tracking_uri: Store of the registry.
        model_name: Registered model; created if missing.
        student_uri: Where the weights are: `gs://...` or a local path.
        weights_sha256: Their digest.
        run_id: MLflow run shown as the version's source; or what finds it, once the store answers.
        trained_by: MLflow run that trained the student, which is shown in its place if the store has it.
        promote: Whether to make it the champion.
        figures: Scores and draft figures, kept as tags `figure.NAME`.
        tags: Lineage; empty values are left out.
        description: Shown on the version's page.
        patience: See `ask_registry`.

    Environment:
        KFP_RUN_ID: Kubeflow's run that registers it.

    Returns:
        The version.

    Raises:
        SkdError: the registry refused or did not answer.
    """
    numbers = {FIGURE_PREFIX + name: repr(float(value)) for name, value in figures.items()}
    lineage = {name: value for name, value in tags.items() if value}
    wanted = {**lineage, **numbers, DIGEST_TAG: weights_sha256, URI_TAG: student_uri}

    registrar = os.environ.get("KFP_RUN_ID", "")

    def work(client: MlflowClient) -> str:
        _ensure_model(client, model_name)
        version = _find(client, model_name, weights_sha256)
        if version is None:
            trainer = get_run(client, trained_by) if trained_by else None
            run = trained_by if trainer else run_id if isinstance(run_id, str) else run_id()
            source = _source(client, tracking_uri, student_uri, weights_sha256, run)
            tags = wanted | ({REGISTERED_BY_TAG: registrar} if registrar else {})
            created = client.create_model_version(
                model_name, source, run_id=run or None, tags=tags, description=description or None
            )
            version = _find(client, model_name, weights_sha256) or str(created.version)
            if version != str(created.version):
                client.delete_model_version(model_name, str(created.version))
        present = client.get_model_version(model_name, version).tags
        for name, value in wanted.items():
            if present.get(name) != value:
                client.set_model_version_tag(model_name, version, name, value)
        client.set_registered_model_alias(model_name, CHALLENGER, version)
        if promote:
            crown(client, model_name, version, by="the pipeline's gate", why=lineage.get(GATE_TAG, ""))
        return version

    return ask_registry(tracking_uri, model_name, work, patience)


def champion(*, tracking_uri: str, model_name: str, patience: float = 0.0) -> Champion | None:
    """The registered champion; None if there is none.

    Args:
        tracking_uri: Store of the registry.
        model_name: Registered model.
        patience: See `ask_registry`.

    Raises:
        SkdError: the registry does not answer: a gate that cannot see the champion must not open.
    """

    def work(client: MlflowClient) -> Champion | None:
        version = aliased(client, model_name, CHAMPION)
        if version is None:
            return None
        return Champion(
            version=str(version.version),
            weights_uri=version.tags.get(URI_TAG, ""),
            weights_sha256=version.tags.get(DIGEST_TAG, ""),
        )

    return ask_registry(tracking_uri, model_name, work, patience)


def step_patience() -> float:
    """Seconds for which a step that cannot do without the registry waits for it."""
    return float(os.environ.get(WAIT_VARIABLE) or 300)


def ask_registry(tracking_uri: str, model_name: str, work: Callable[[MlflowClient], T], patience: float = 0.0) -> T:
    """Do `work`, several times if need be: of two processes that set one new alias at once, one is refused.

    So `work` must find again what it did before.

    Args:
        tracking_uri: Store of the registry.
        model_name: Registered model.
        work: What is done with it.
        patience: Seconds for which a registry that does not answer is asked again; at the least it is asked a few
            times. One that refuses is not waited for.

    Raises:
        SkdError: the registry refused; `Silent` where it did not answer.
    """
    start = time.monotonic()
    waiting = Progress("waiting for MLflow", round(patience))
    attempt = 0
    while True:
        attempt += 1
        try:
            return work(connect(tracking_uri))
        except unanswered() as error:
            waited = time.monotonic() - start
            if attempt >= _ATTEMPTS and (waited >= patience or not is_silence(error)):
                lasted = f" for {waited:.0f} seconds" if patience and is_silence(error) else ""
                raise (Silent if is_silence(error) else SkdError)(
                    f"the MLflow registry refused or did not answer{lasted}: {brief(error)}",
                    where=f"registered model `{model_name}` at `{shown(tracking_uri)}`",
                    hint="check the tracking store and try again; what was registered already is found again",
                ) from error
            log.info("the MLflow registry refused or did not answer, trying again: %s", brief(error))
            if attempt < _ATTEMPTS:
                time.sleep(random.uniform(0.1, 0.5))  # noqa: S311
            else:
                waiting.update(round(min(waited, patience)))
                time.sleep(min(2.0 ** (attempt - _ATTEMPTS), _LONGEST_PAUSE, max(patience - waited, 0.0)))


def quoted(name: str) -> str:
    """A name as MLflow's searches want it."""
    quote = '"' if "'" in name else "'"
    return f"{quote}{name}{quote}"


def _ensure_model(client: MlflowClient, name: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(
            name, description="Students distilled from a teacher, by speculative knowledge distillation."
        )
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _find(client: MlflowClient, name: str, weights_sha256: str) -> str | None:
    """The oldest version with these weights."""
    found = client.search_model_versions(f"name = {quoted(name)} and tags.`{DIGEST_TAG}` = '{weights_sha256}'")
    return str(min(int(version.version) for version in found)) if found else None


def _source(client: MlflowClient, tracking_uri: str, student_uri: str, weights_sha256: str, run_id: str) -> Any:
    """What to register as the version's source.

    A tracking server refuses a path of this machine that is not among the run's own artifacts, with reason: nobody
    else could read it. There the run gets a small file that says where the weights are, and the version points at it.
    """
    remote = "://" in student_uri and not student_uri.startswith("file://")
    if remote or is_local_store(tracking_uri) or not run_id:
        return student_uri
    log.warning(
        "%s is a path of this machine, which a tracking server cannot serve: the registered version points at a note "
        "of it. Keep artifacts in object storage to share students.",
        student_uri,
    )
    client.log_dict(run_id, {"weights_uri": student_uri, "weights_sha256": weights_sha256}, "student/weights.json")
    return f"runs:/{run_id}/student"
