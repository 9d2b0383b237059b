"""Who is champion: the alias of a registered model, and who moved it, when and why.

The registered model's tag `skd.champions` holds the line of champions, from which `rollback` takes the one before.
Versions tell their own part in tags `champion.*`.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, TypeAdapter

from skd_lib.tracking.client import TAG_LENGTH, clip

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

CHALLENGER, CHAMPION = "challenger", "champion"
LINE_TAG = "skd.champions"
BY_HAND = "the alias was moved by hand"
REMEDY = (
    "put its files back, give the alias champion to a version that has them (`skd promote`, `skd rollback`), or delete "
    "the alias in MLflow's page"
)
"""What to do about a champion whose files are gone."""
_REMEMBERED = 20
_WHY_LENGTH = 150  # so that most of the line fits into one tag
_SINCE = ("champion.since", "champion.by", "champion.why")
_UNTIL = ("champion.until", "champion.until_by", "champion.until_why")


class Reign(BaseModel):
    """One version's time as champion.

    Attributes:
        version: Of the registered model.
        since: ISO 8601, UTC.
        by: Who made it champion: a person, or the pipeline.
        why: In words.
    """

    model_config = ConfigDict(frozen=True)

    version: str
    since: str
    by: str
    why: str


_LINE = TypeAdapter(list[Reign])


def aliased(client: MlflowClient, name: str, alias: str) -> ModelVersion | None:
    """The version that has an alias; None if there is no such model, or it has no such alias."""
    from mlflow.exceptions import MlflowException

    try:
        return client.get_model_version_by_alias(name, alias)
    except MlflowException as error:
        # No such model, or a model without this alias: for the second MLflow has no code of its own.
        no_alias = error.error_code == "INVALID_PARAMETER_VALUE" and "not found" in str(error)
        if error.error_code == "RESOURCE_DOES_NOT_EXIST" or no_alias:
            return None
        raise


def line(client: MlflowClient, name: str) -> list[Reign]:
    """The champions one after the other, the present one last; none if the model has no champion."""
    present = aliased(client, name, CHAMPION)
    if present is None:
        return []
    reigns = _LINE.validate_json(client.get_registered_model(name).tags.get(LINE_TAG, "[]"))
    if not reigns or reigns[-1].version != str(present.version):
        reigns.append(Reign(version=str(present.version), since="", by="", why=BY_HAND))
    return reigns


def crown(client: MlflowClient, name: str, version: str, *, by: str, why: str) -> None:
    """Make a version the champion; nothing changes if it is already.

    The line is written last: if this is interrupted, the alias seems to have been moved by hand, and another call
    completes the record.
    """
    reigns = line(client, name)
    if reigns and reigns[-1].version == version:
        if reigns[-1].why != BY_HAND:
            return
        reigns.pop()
    reign = Reign(version=version, since=_now(), by=by, why=why)
    client.set_registered_model_alias(name, CHAMPION, version)
    _tell(client, name, reign, before=reigns[-1].version if reigns else "")
    _write_line(client, name, [*reigns, reign])


def step_back(client: MlflowClient, name: str, *, by: str, why: str) -> None:
    """Make the champion before the present one the champion again. The alias moves last, so that a retry ends there."""
    *earlier, before, present = line(client, name)
    reign = Reign(version=before.version, since=_now(), by=by, why=why)
    _write_line(client, name, [*earlier, reign])
    _tell(client, name, reign, before=present.version)
    client.set_registered_model_alias(name, CHAMPION, reign.version)


def _write_line(client: MlflowClient, name: str, reigns: list[Reign]) -> None:
    kept = [reign.model_copy(update={"why": clip(reign.why, _WHY_LENGTH)}) for reign in reigns[-_REMEMBERED:]]
    while len(text := _LINE.dump_json(kept).decode()) > TAG_LENGTH:
        kept = kept[1:]
    client.set_registered_model_tag(name, LINE_TAG, text)


def _tell(client: MlflowClient, name: str, reign: Reign, *, before: str) -> None:
    """Who, when and why, on the version that becomes champion and on the one that was."""
    known = client.get_model_version(name, reign.version).tags
    for tag in _UNTIL:
        if tag in known:
            client.delete_model_version_tag(name, reign.version, tag)
    told = tuple(clip(text, TAG_LENGTH) for text in (reign.since, reign.by, reign.why))
    for tag, value in zip(_SINCE, told, strict=True):
        client.set_model_version_tag(name, reign.version, tag, value)
    if before:
        for tag, value in zip(_UNTIL, told, strict=True):
            client.set_model_version_tag(name, before, tag, value)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
