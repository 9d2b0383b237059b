"""Moving the champion's alias by hand: to a version, or back to the champion before."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from skd_lib import storage
from skd_lib.errors import SkdError
from skd_lib.tracking import champions
from skd_lib.tracking.client import is_local_store
from skd_lib.tracking.registry import DIGEST_TAG, URI_TAG, ask_registry, quoted

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion, RegisteredModel


@dataclass(frozen=True)
class Move:
    """What happened to the alias: the champion now, and the one before (empty: none)."""

    model: str
    version: str
    before: str


def promote(*, tracking_uri: str, model: str, version: str, by: str, why: str) -> Move:
    """Make a version the champion.

    Args:
        tracking_uri: Store of the registry.
        model: Registered model.
        version: Its version.
        by: Who wants it.
        why: The reason; both are kept in the registry.

    Raises:
        SkdError: there is no such model or version, it is the champion already, it is no student of the pipeline, or
            its weights are gone.
    """
    return ask_registry(tracking_uri, model, lambda client: _promote(client, tracking_uri, model, version, by, why))


def rollback(*, tracking_uri: str, model: str, by: str, why: str) -> Move:
    """Make the champion before the present one the champion again; a second time, the one before that.

    Args:
        tracking_uri: Store of the registry.
        model: Registered model.
        by: Who wants it.
        why: The reason; both are kept in the registry.

    Raises:
        SkdError: there is no champion, none before it, or its weights are gone.
    """
    return ask_registry(tracking_uri, model, lambda client: _rollback(client, tracking_uri, model, by, why))


def find_version(client: MlflowClient, model: str, version: str) -> ModelVersion:
    """A version of a registered model.

    Raises:
        SkdError: there is none; the hint names those there are.
    """
    present = versions_of(client, model)
    if version in present:
        return client.get_model_version(model, version)  # which tells its aliases; a search does not
    registered_model(client, model)
    raise SkdError(f"no version {version}", where=model, hint=f"its versions are: {', '.join(present) or 'none'}")


def versions_of(client: MlflowClient, model: str) -> list[str]:
    """Return the versions of a registered model; none if there is no such model."""
    return sorted({str(found.version) for found in client.search_model_versions(f"name = {quoted(model)}")}, key=int)


def registered_model(client: MlflowClient, model: str) -> RegisteredModel:
    """Return a registered model.

    Raises:
        SkdError: there is none of this name; the hint names those there are.
    """
    from mlflow.exceptions import MlflowException

    try:
        return client.get_registered_model(model)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        names = ", ".join(found.name for found in client.search_registered_models()) or "none"
        raise SkdError("no such registered model", where=model, hint=f"registered are: {names}") from error


def _promote(client: MlflowClient, tracking_uri: str, model: str, version: str, by: str, why: str) -> Move:
    wanted = find_version(client, model, version)
    present = champions.line(client, model)
    if present and present[-1].version == version and present[-1].why != champions.BY_HAND:
        raise SkdError(
            f"version {version} is the champion already", where=model, hint=f"`skd lineage {model}` shows since when"
        )
    _check_usable(wanted, model, tracking_uri)
    champions.crown(client, model, version, by=by, why=why)
    return Move(model, version, present[-1].version if present else "")


def _rollback(client: MlflowClient, tracking_uri: str, model: str, by: str, why: str) -> Move:
    present = champions.line(client, model)
    if not present:
        raise SkdError("no champion to roll back from", where=model, hint=f"make one: `skd promote {model} VERSION`")
    if len(present) == 1:
        raise SkdError(
            f"version {present[0].version} is the first champion that is known: there is none to go back to",
            where=model,
            hint=f"name the version that is to be champion: `skd promote {model} VERSION`",
        )
    _check_usable(find_version(client, model, present[-2].version), model, tracking_uri)
    champions.step_back(client, model, by=by, why=why)
    return Move(model, present[-2].version, present[-1].version)


def _check_usable(version: ModelVersion, model: str, tracking_uri: str) -> None:
    where = f"{model} version {version.version}"
    if DIGEST_TAG not in version.tags:
        raise SkdError(
            "this version is no student that the pipeline registered: the digest of its weights is not known",
            where=where,
            hint="promote a version that has the tag `weights_sha256`",
        )
    weights = version.tags.get(URI_TAG, "")
    # A path of another machine cannot be looked at from here; behind a server it may be one. Kubeflow's own storage is
    # seen from inside the cluster alone, and people move aliases from their own machines.
    remote = storage.is_remote(weights) and not weights.startswith("minio://")
    visible = remote or (is_local_store(tracking_uri) and "://" not in weights) or Path(weights).exists()
    if visible and not storage.exists(weights):
        raise SkdError(
            f"its weights are gone: there is nothing at {weights}", where=where, hint="promote another version"
        )
