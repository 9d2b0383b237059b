"""The connection to MLflow: quiet, without telemetry, with short waits, and only to stores that MLflow still starts."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit, urlunsplit

from skd_lib.errors import SkdError

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

# No usage data leaves the machine, and a server that is down costs seconds, not the
# quarter of an hour of MLflow's own defaults. What the user set in the environment wins.
_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}
_SCHEMES = ("sqlite", "http", "https", "postgresql", "mysql", "mssql", "databricks")
_SQLITE = "sqlite:///"
_HINT = "use `sqlite:///runs/mlflow.db` on one machine, or the `http(s)://` address of a tracking server"


def quieten() -> None:
    """Set what MLflow reads from the environment; to be called before it is imported."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def connect(tracking_uri: str) -> MlflowClient:
    """A client of the tracking store; the folder of a sqlite file is created. A server is not contacted yet.

    Args:
        tracking_uri: `sqlite:///FILE`, the URL of a tracking server, or another database URL.

    Raises:
        SkdError: MLflow is not installed, cannot use this URI, or the sqlite file cannot be created or opened.
        SQLAlchemyError: a database server does not answer.
    """
    _check_uri(tracking_uri)
    quieten()
    try:
        from mlflow import MlflowClient
    except ImportError as error:
        raise SkdError(
            f"MLflow is not installed ({error})",
            where=f"tracking URI `{tracking_uri}`",
            hint="install the extra `tracking`, or leave the tracking URI empty to run without tracking",
        ) from error
    logging.getLogger("alembic").setLevel(logging.WARNING)
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # one line a retry; ours is one in all
    if not is_local_store(tracking_uri):
        return MlflowClient(tracking_uri=tracking_uri, registry_uri=tracking_uri)
    try:
        with _alone_with(_sqlite_file(tracking_uri)):
            return MlflowClient(tracking_uri=tracking_uri, registry_uri=tracking_uri)
    except unanswered() as error:
        raise SkdError(
            f"MLflow cannot open the sqlite file: {brief(error)}",
            where=f"tracking URI `{tracking_uri}`",
            hint="if another version of MLflow made it, run `mlflow db upgrade`; else move it away, a new one is made",
        ) from error


def find_or_create_experiment(client: MlflowClient, tracking_uri: str, name: str) -> str:
    """The experiment's id; several processes may ask for a new one at once.

    Artifacts of a sqlite store go to the folder `mlartifacts` beside its file; a server decides for itself.

    Raises:
        SkdError: an experiment of that name was deleted, so that MLflow refuses to write to it.
        MlflowException: the store does not answer.
    """
    from mlflow.exceptions import MlflowException

    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        try:
            # The kind makes MLflow's page open with training runs rather than with traces of language-model calls.
            kind = {"mlflow.experimentKind": "custom_model_development"}
            return str(client.create_experiment(name, artifact_location=_artifact_location(tracking_uri), tags=kind))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            experiment = client.get_experiment_by_name(name)  # another process was faster
    if experiment is None or experiment.lifecycle_stage == "deleted":
        raise SkdError(
            f"the MLflow experiment `{name}` was deleted",
            where=f"tracking URI `{tracking_uri}`",
            hint="restore it (`mlflow experiments restore`), remove it for good (`mlflow gc`), or use another name",
        )
    return str(experiment.experiment_id)


def run_url(tracking_uri: str, run: Run) -> str:
    """Address of a run's page, without the credentials that the URI may hold; empty where the store is no server."""
    parts = urlsplit(tracking_uri)
    if parts.scheme not in ("http", "https"):
        return ""
    server = urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path.rstrip("/"), "", ""))
    return f"{server}/#/experiments/{run.info.experiment_id}/runs/{run.info.run_id}"


def check_tracking(tracking_uri: str) -> SkdError | None:
    """What is wrong with the tracking store, for a check before the work starts; None if it answers."""
    from_server = tracking_uri.startswith(("http://", "https://"))
    try:
        connect(tracking_uri).search_experiments(max_results=1)
    except SkdError as error:
        return error
    except unanswered() as error:
        hint = "start it, or check the address, the network and the credentials" if from_server else _HINT
        return SkdError(f"MLflow does not answer: {brief(error)}", where=f"tracking URI `{tracking_uri}`", hint=hint)
    return None


def unanswered() -> tuple[type[Exception], ...]:
    """What MLflow's client raises when the store refuses a request, answers badly or does not answer."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    return (MlflowException, SQLAlchemyError, OSError)  # requests' exceptions are OSErrors


def brief(error: Exception) -> str:
    """An error's text in one line of moderate length, from its root cause on: MLflow nests connection pools in it."""
    text = " ".join(str(error).split()) or type(error).__name__
    cause = text.rfind("Caused by ")
    text = text[cause:] if cause >= 0 else text
    return text if len(text) <= 300 else text[:297] + "..."


def is_local_store(tracking_uri: str) -> bool:
    """Whether this process opens the store's file itself, with no server between."""
    return tracking_uri.startswith(_SQLITE)


def _check_uri(uri: str) -> None:
    where = f"tracking URI `{uri}`"
    scheme = uri.partition(":")[0].partition("+")[0]
    if scheme not in _SCHEMES:
        raise SkdError("MLflow no longer starts a store of this kind", where=where, hint=_HINT)
    if scheme != "sqlite":
        return
    if not uri.startswith(_SQLITE) or not uri.removeprefix(_SQLITE):
        raise SkdError("not the URI of a sqlite file", where=where, hint=_HINT)
    folder = _sqlite_file(uri).parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SkdError(f"cannot create the folder {folder}: {error.strerror}", where=where, hint=_HINT) from error
    if not os.access(folder, os.W_OK):
        raise SkdError(f"the folder {folder} is not writable", where=where, hint=_HINT)


@contextmanager
def _alone_with(database: Path) -> Iterator[None]:
    """Keep other processes out: two that make the tables of one sqlite file at once both fail."""
    import fcntl

    with database.with_name(f"{database.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _sqlite_file(uri: str) -> Path:
    return Path(uri.removeprefix(_SQLITE).partition("?")[0])


def _artifact_location(tracking_uri: str) -> Any:
    if not is_local_store(tracking_uri):
        return None
    return (_sqlite_file(tracking_uri).resolve().parent / "mlartifacts").as_uri()
