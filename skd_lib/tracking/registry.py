"""The registered students: one version for each set of weights, found again by their digest.

A version points at the weights by URI; the weights themselves are never sent through the tracking server. The alias
`challenger` is the student registered last, `champion` the best one that passed the gate. A version's tags hold its
lineage, the task's scores and the figures as a draft, as they were when it was registered. The registered model's tag
`skd.champions` holds the history of champions, and a version's tags `champion.*` its own part of it.
"""

from __future__ import annotations

import logging
import os
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, TypeVar

from pydantic import BaseModel, ConfigDict, TypeAdapter

from skd_lib._core.events import Progress
from skd_lib._core.machine import pipeline_run_id
from skd_lib._core.uris import shown
from skd_lib.errors import SkdError
from skd_lib.tracking.client import TAG_LENGTH, brief, clip, connect, is_silence, unanswered
from skd_lib.tracking.locate import get_run
from skd_lib.tracking.mlmodel import version_source
from skd_lib.tracking.models import model_made, model_page, name_version

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel
    from mlflow.entities.model_registry import ModelVersion, RegisteredModel

log = logging.getLogger(__name__)
T = TypeVar("T")
_ATTEMPTS = 4
WAIT_VARIABLE = "SKD_REGISTRY_WAIT"
"""Seconds for which a step that needs the registry waits for it, 300 unless set."""
_LONGEST_PAUSE = 15.0

CHALLENGER, CHAMPION = "challenger", "champion"
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
DRAFTED_TAG = "drafted"
"""Says how the figures as a draft were measured."""
SERVED_TAG = "vllm_serve"
"""Holds the line with which vLLM was started to measure the student as a draft; absent where it was not."""
HISTORY_TAG = "skd.champions"
BY_HAND = "the alias was moved by hand"
_REMEMBERED = 20
_WHY_LENGTH = 150  # so that most of the history fits into one tag
_SINCE = ("champion.since", "champion.by", "champion.why")
_UNTIL = ("champion.until", "champion.until_by", "champion.until_why")


class Silent(SkdError):
    """The registry does not answer now, and may do so later."""


@dataclass(frozen=True)
class Champion:
    """The version that has the alias `champion`, where its weights are, and how it was accepted as a draft.

    `drafted` is `Specdec.setting` of that measurement; both are empty where it was not measured as a draft.
    """

    version: str
    weights_uri: str
    weights_sha256: str
    acceptance_rate: float | None = None
    drafted: str = ""


class ChampionRecord(BaseModel):
    """One version's time as champion: since when (ISO 8601, UTC), by which person or pipeline, and why."""

    model_config = ConfigDict(frozen=True)

    version: str
    since: str
    by: str
    why: str


_HISTORY = TypeAdapter(list[ChampionRecord])


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
    example: str = "",
    patience: float = 0.0,
) -> str:
    """Register a student, or find the version that has these very weights, and set the aliases.

    Idempotent, and safe when two processes register the same weights: versions are numbered in the order in which
    they are made, so the later of two sees the earlier and withdraws. Tags are those of the latest call, figures are
    tags `figure.NAME`. The version's source is the MLflow run `trained_by`, if the store has it, else `run_id`, or what
    that finds once the store answers.
    """
    numbers = {FIGURE_PREFIX + name: repr(float(value)) for name, value in figures.items()}
    lineage = {name: value for name, value in tags.items() if value}
    wanted = {**lineage, **numbers, DIGEST_TAG: weights_sha256, URI_TAG: student_uri}
    registrar = pipeline_run_id()

    def work(client: MlflowClient) -> str:
        _ensure_model(client, model_name)
        made = _made(client, run_id)
        version = _find(client, model_name, weights_sha256)
        if version is None:
            trainer = get_run(client, trained_by) if trained_by else None
            run = trained_by if trainer else run_id if isinstance(run_id, str) else run_id()
            source = version_source(client, tracking_uri, student_uri, weights_sha256, run, example)
            tags = wanted | ({REGISTERED_BY_TAG: registrar} if registrar else {})
            link = f"[Model of the run, with its figures]({model_page(made)})" if made else ""
            text = "\n\n".join(filter(None, (description, link)))
            created = client.create_model_version(
                model_name, source, run_id=run or None, tags=tags, description=text or None
            )
            version = _find(client, model_name, weights_sha256) or str(created.version)
            if version != str(created.version):
                client.delete_model_version(model_name, str(created.version))
        present = client.get_model_version(model_name, version).tags
        for name, value in wanted.items():
            if present.get(name) != value:
                client.set_model_version_tag(model_name, version, name, value)
        if made:
            name_version(client, made, model_name, version)
        client.set_registered_model_alias(model_name, CHALLENGER, version)
        if promote:
            set_champion(client, model_name, version, by="the pipeline's gate", why=lineage.get(GATE_TAG, ""))
        return version

    return ask_registry(tracking_uri, model_name, work, patience)


def champion(*, tracking_uri: str, model_name: str, patience: float = 0.0) -> Champion | None:
    """Return the registered champion; None if there is none. A registry that does not answer is an error."""

    def work(client: MlflowClient) -> Champion | None:
        found = aliased(client, model_name, CHAMPION)
        if found is None:
            return None
        tags = found.tags
        rate = tags.get(f"{FIGURE_PREFIX}acceptance_rate")
        return Champion(
            str(found.version),
            tags.get(URI_TAG, ""),
            tags.get(DIGEST_TAG, ""),
            None if rate is None else float(rate),
            tags.get(DRAFTED_TAG, ""),
        )

    return ask_registry(tracking_uri, model_name, work, patience)


def step_patience() -> float:
    """Return the seconds for which a step that cannot do without the registry waits for it."""
    return float(os.environ.get(WAIT_VARIABLE) or 300)


def ask_registry(tracking_uri: str, model_name: str, work: Callable[[MlflowClient], T], patience: float = 0.0) -> T:
    """Do `work`, several times if need be: of two processes that set one new alias at once, one is refused.

    So `work` must find again what it did before. A registry that does not answer is asked again for `patience` seconds,
    at the least a few times; one that refuses is not waited for.

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


def aliased(client: MlflowClient, name: str, alias: str) -> ModelVersion | None:
    """Return the version that has an alias; None if there is no such model, or it has no such alias."""
    from mlflow.exceptions import MlflowException

    try:
        return client.get_model_version_by_alias(name, alias)
    except MlflowException as error:
        # No such model, or a model without this alias: for the second MLflow has no code of its own.
        no_alias = error.error_code == "INVALID_PARAMETER_VALUE" and "not found" in str(error)
        if error.error_code == "RESOURCE_DOES_NOT_EXIST" or no_alias:
            return None
        raise


def find_version(client: MlflowClient, model: str, version: str) -> ModelVersion:
    """Return a version of a registered model."""
    present = versions_of(client, model)
    if version in present:
        return client.get_model_version(model, version)  # with its aliases, which a search leaves out
    registered_model(client, model)
    raise SkdError(f"no version {version}", where=model, hint=f"its versions are: {', '.join(present) or 'none'}")


def versions_of(client: MlflowClient, model: str) -> list[str]:
    """Return the versions of a registered model; none if there is no such model."""
    return sorted({str(found.version) for found in client.search_model_versions(f"name = {_quoted(model)}")}, key=int)


def registered_model(client: MlflowClient, model: str) -> RegisteredModel:
    """Return a registered model."""
    from mlflow.exceptions import MlflowException

    try:
        return client.get_registered_model(model)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        names = ", ".join(found.name for found in client.search_registered_models()) or "none"
        raise SkdError("no such registered model", where=model, hint=f"registered are: {names}") from error


def history(client: MlflowClient, name: str) -> list[ChampionRecord]:
    """Return the champions one after the other, the present one last; none if the model has no champion."""
    present = aliased(client, name, CHAMPION)
    if present is None:
        return []
    records = _HISTORY.validate_json(client.get_registered_model(name).tags.get(HISTORY_TAG, "[]"))
    if not records or records[-1].version != str(present.version):
        records.append(ChampionRecord(version=str(present.version), since="", by="", why=BY_HAND))
    return records


def set_champion(client: MlflowClient, name: str, version: str, *, by: str, why: str) -> None:
    """Make a version the champion; nothing changes if it is already.

    The history is written last: if this is interrupted, the alias seems to have been moved by hand, and another call
    completes the record.
    """
    records = history(client, name)
    if records and records[-1].version == version:
        if records[-1].why != BY_HAND:
            return
        records.pop()
    record = ChampionRecord(version=version, since=_now(), by=by, why=why)
    client.set_registered_model_alias(name, CHAMPION, version)
    _tag_versions(client, name, record, before=records[-1].version if records else "")
    _write_history(client, name, [*records, record])


def restore_champion(client: MlflowClient, name: str, *, by: str, why: str) -> None:
    """Make the champion before the present one the champion again. The alias moves last, so a retry ends there."""
    *earlier, before, present = history(client, name)
    record = ChampionRecord(version=before.version, since=_now(), by=by, why=why)
    _write_history(client, name, [*earlier, record])
    _tag_versions(client, name, record, before=present.version)
    client.set_registered_model_alias(name, CHAMPION, record.version)


def _write_history(client: MlflowClient, name: str, records: list[ChampionRecord]) -> None:
    kept = [record.model_copy(update={"why": clip(record.why, _WHY_LENGTH)}) for record in records[-_REMEMBERED:]]
    while len(text := _HISTORY.dump_json(kept).decode()) > TAG_LENGTH:
        kept = kept[1:]
    client.set_registered_model_tag(name, HISTORY_TAG, text)


def _tag_versions(client: MlflowClient, name: str, record: ChampionRecord, *, before: str) -> None:
    """Write who, when and why on the version that becomes champion and on the one before."""
    known = client.get_model_version(name, record.version).tags
    for tag in _UNTIL:
        if tag in known:
            client.delete_model_version_tag(name, record.version, tag)
    values = [clip(text, TAG_LENGTH) for text in (record.since, record.by, record.why)]
    for version, names in ((record.version, _SINCE), (before, _UNTIL)):
        for tag, value in zip(names, values, strict=True) if version else ():
            client.set_model_version_tag(name, version, tag, value)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _quoted(name: str) -> str:
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


def _made(client: MlflowClient, run_id: str | Callable[[], str]) -> LoggedModel | None:
    """Return the logged model of the run that registers a student; None where there is none, or MLflow is too old."""
    try:
        return model_made(client, found) if (found := run_id if isinstance(run_id, str) else run_id()) else None
    except unanswered() as error:
        log.info("the registered version will not be linked with a logged model: %s", brief(error))
        return None


def _find(client: MlflowClient, name: str, weights_sha256: str) -> str | None:
    """Return the oldest version with these weights."""
    found = client.search_model_versions(f"name = {_quoted(name)} and tags.`{DIGEST_TAG}` = '{weights_sha256}'")
    return str(min(int(version.version) for version in found)) if found else None
