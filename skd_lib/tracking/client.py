"""The connection to MLflow: quiet, without telemetry, with short waits, and only to stores that MLflow still starts."""

from __future__ import annotations

import logging
import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit, urlunsplit

from skd_lib._core import events
from skd_lib._core.uris import is_sqlite, redacted, shown, sqlite_file, sqlite_uri
from skd_lib.errors import SkdError
from skd_lib.tracking.credentials import use_credentials

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Experiment, Run

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
_DATABASE_ATTEMPTS = 4  # in all, within seconds; MLflow's own pauses add up to minutes
_RECORDS = ("experiments", "runs", "registered_models")
_SIDE_FILES = ("", "-journal", "-wal", "-shm")
_HINT = "use `sqlite:///runs/mlflow.db` on one machine, or the `http(s)://` address of a tracking server"


class Deleted(SkdError):
    """The experiment was deleted: MLflow takes nothing for it until it is restored."""


def quieten() -> None:
    """Set what MLflow reads from the environment; to be called before it is imported."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def connect(tracking_uri: str) -> MlflowClient:
    """A client of the tracking store; a sqlite file and its folder are created. A server is not contacted yet.

    Args:
        tracking_uri: `sqlite:///FILE`, the URL of a tracking server, or another database URL.

    Raises:
        SkdError: MLflow is not installed, cannot use this URI, or the sqlite file cannot be created or opened.
        SQLAlchemyError: a database server does not answer.
    """
    _check_uri(tracking_uri)
    quieten()
    use_credentials(tracking_uri)
    try:
        from mlflow import MlflowClient
    except ImportError as error:
        raise SkdError(
            f"MLflow is not installed ({error})",
            where=store_name(tracking_uri),
            hint="install the extra `tracking`, or leave the tracking URI empty to run without tracking",
        ) from error
    logging.getLogger("alembic").setLevel(logging.WARNING)
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # one line a retry; ours is one in all
    database = sqlite_file(tracking_uri)
    if database is None:
        return _connect_to_server(tracking_uri)
    try:
        with _alone_with(database):
            if _is_half_made(database):
                _set_aside(database)
            if not database.exists():
                _make(database)
            return MlflowClient(tracking_uri=tracking_uri, registry_uri=tracking_uri)
    except unanswered() as error:
        raise SkdError(
            f"MLflow cannot open the sqlite file: {brief(error)}",
            where=store_name(tracking_uri),
            hint=_hint(database, error),
        ) from error


def _is_server(tracking_uri: str) -> bool:
    return tracking_uri.startswith(("http://", "https://"))


def _connect_to_server(tracking_uri: str) -> MlflowClient:
    from mlflow import MlflowClient

    try:
        if not _is_server(tracking_uri):  # else a database, which mlflow-skinny knows nothing of
            import mlflow.store.db.utils

            mlflow.store.db.utils.MAX_RETRY_COUNT = _DATABASE_ATTEMPTS
        return MlflowClient(tracking_uri=tracking_uri, registry_uri=tracking_uri)
    except ImportError as error:
        raise SkdError(
            f"the Python package `{error.name}`, by which this database is reached, is not installed",
            where=store_name(tracking_uri),
            hint=f"`pip install {error.name}`, or name another driver in the URI",
        ) from error
    except ValueError as error:
        raise SkdError(f"not the URI of a store: {brief(error)}", where=store_name(tracking_uri), hint=_HINT) from error


def find_experiment(client: MlflowClient, name: str) -> Experiment | None:
    """The experiment of a name, deleted or not; None if there is none.

    Raises:
        MlflowException: the store does not answer.
        ConnectionError: something else answers in its place.
    """
    experiment = client.get_experiment_by_name(name)
    if experiment is not None and not experiment.experiment_id:  # to MLflow's client `{}` is an experiment
        raise ConnectionError("what answers there is no MLflow")
    return experiment


def find_or_create_experiment(client: MlflowClient, tracking_uri: str, name: str) -> str:
    """The experiment's id; several processes may ask for a new one at once.

    Artifacts of a sqlite store go to the folder `mlartifacts` beside its file; a server decides for itself.

    Raises:
        Deleted: an experiment of that name was deleted, so that MLflow refuses to write to it.
        MlflowException: the store does not answer.
        ConnectionError: something else answers in its place.
    """
    from mlflow.exceptions import MlflowException

    experiment = find_experiment(client, name)
    if experiment is None:
        try:
            # The kind makes MLflow's page open with training runs rather than with traces of language-model calls.
            kind = {"mlflow.experimentKind": "custom_model_development"}
            return str(client.create_experiment(name, artifact_location=_artifact_location(tracking_uri), tags=kind))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            experiment = find_experiment(client, name)  # another process was faster
    if experiment is None:
        raise ConnectionError(f"the experiment {name} is there, and is not")
    check_not_deleted(experiment, tracking_uri)
    return str(experiment.experiment_id)


def check_not_deleted(experiment: Experiment, tracking_uri: str) -> None:
    """Refuse an experiment that was deleted, to which MLflow takes nothing.

    Raises:
        Deleted: it was.
    """
    if experiment.lifecycle_stage == "deleted":
        raise Deleted(
            f"the MLflow experiment `{experiment.name}` was deleted",
            where=store_name(tracking_uri),
            hint=f"restore it (`mlflow experiments restore --experiment-id {experiment.experiment_id}`), remove it for "
            "good (`mlflow gc`), or use another name",
        )


def run_url(tracking_uri: str, run: Run) -> str:
    """Address of a run's page, without the credentials that the URI may hold; empty where the store is no server."""
    parts = urlsplit(shown(tracking_uri))
    if parts.scheme not in ("http", "https"):
        return ""
    server = urlunsplit((parts.scheme, parts.netloc, parts.path.rstrip("/"), "", ""))
    return f"{server}/#/experiments/{run.info.experiment_id}/runs/{run.info.run_id}"


def check_tracking(tracking_uri: str, experiment: str = "") -> SkdError | None:
    """What is wrong with the tracking store, for a check before the work starts; None if it answers.

    Args:
        tracking_uri: See `connect`.
        experiment: An experiment that must not be a deleted one; empty: none.
    """
    from_server = _is_server(tracking_uri)
    try:
        client = connect(tracking_uri)
        client.search_experiments(max_results=1)
        if experiment and client.get_experiment_by_name(experiment) is not None:
            find_or_create_experiment(client, tracking_uri, experiment)
    except SkdError as error:
        return error
    except unanswered() as error:
        hint = "start it, or check the address, the network and the credentials" if from_server else _HINT
        return SkdError(f"MLflow does not answer: {brief(error)}", where=store_name(tracking_uri), hint=hint)
    return None


def unanswered() -> tuple[type[Exception], ...]:
    """What MLflow's client raises when the store refuses a request, answers badly or does not answer."""
    from google.protobuf.json_format import ParseError  # of an answer in JSON that is not MLflow's
    from mlflow.exceptions import MlflowException

    of_stores = (MlflowException, ParseError, OSError)  # requests' exceptions are OSErrors
    try:
        from sqlalchemy.exc import SQLAlchemyError
    except ImportError:  # with mlflow-skinny, by which servers only are reached
        return of_stores
    return (*of_stores, SQLAlchemyError)


def untaken() -> tuple[type[Exception], ...]:
    """What is raised where the store does not take a step's records now, but may do so later."""
    return (Deleted, *unanswered())


def is_silence(error: Exception) -> bool:
    """Whether an error says that the store cannot answer now, rather than that it refuses what it was asked."""
    from mlflow.exceptions import MlflowException

    refused = isinstance(error, MlflowException) and error.error_code not in (
        "INTERNAL_ERROR",
        "TEMPORARILY_UNAVAILABLE",
        "REQUEST_LIMIT_EXCEEDED",
        "ENDPOINT_NOT_FOUND",  # as a proxy says in the place of a server that is away
    )
    return not refused


def brief(error: Exception) -> str:
    """An error's text in one line of moderate length, from its root cause on: MLflow nests connection pools in it."""
    text = " ".join(redacted(str(error)).split()) or type(error).__name__
    cause = text.rfind("Caused by ")
    text = text[cause:] if cause >= 0 else text
    return text if len(text) <= 300 else text[:297] + "..."


def store_name(tracking_uri: str) -> str:
    """A store as messages name it."""
    return f"tracking URI `{shown(tracking_uri)}`"


def is_local_store(tracking_uri: str) -> bool:
    """Whether this process opens the store's file itself, with no server between."""
    return is_sqlite(tracking_uri)


def _check_uri(uri: str) -> None:
    where = store_name(uri)
    scheme = uri.partition(":")[0].partition("+")[0]
    if scheme not in _SCHEMES:
        raise SkdError("MLflow no longer starts a store of this kind", where=where, hint=_HINT)
    if scheme != "sqlite":
        return
    database = sqlite_file(uri)
    if database is None:
        raise SkdError("not the URI of a sqlite file", where=where, hint=_HINT)
    folder = database.parent
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


def _is_half_made(database: Path) -> bool:
    """Whether a process was ended while MLflow made the tables: they are MLflow's, and no record is in them.

    (MLflow makes an experiment as soon as the tables are complete.)
    """
    if not database.is_file():
        return False
    try:
        with closing(sqlite3.connect(database, timeout=20)) as connection:
            tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            # The names are constants.
            counted = [connection.execute(f"SELECT 1 FROM {name} LIMIT 1") for name in tables & {*_RECORDS}]  # noqa: S608
            is_empty = not any(found.fetchone() for found in counted)
    except sqlite3.Error:  # it is another kind of file, or in use: MLflow says so
        return False
    return is_empty and (not tables or bool(tables & {"alembic_version", *_RECORDS}))


def _set_aside(database: Path) -> None:
    """Move a half-made database away, with what sqlite keeps of it in other files."""
    number = 1
    while (aside := database.with_name(f"{database.name}.incomplete-{number}")).exists():
        number += 1
    for suffix in _SIDE_FILES:
        file = database.with_name(database.name + suffix)
        if file.exists():
            file.rename(aside.with_name(aside.name + suffix))
    events.note(
        f"{database} had no records and not all of its tables: a process was ended while it made them. It is moved to "
        f"{aside.name}, and a new one is made"
    )


def _make(database: Path) -> None:
    """Make the tables in a file of another name, and rename it: a process that ends leaves nothing half-made."""
    from mlflow.store.tracking import DEFAULT_LOCAL_FILE_AND_ARTIFACT_PATH
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    target = database.resolve()  # of a link, what it points to
    new = target.with_name(f".{target.name}.new")
    files = [new.with_name(new.name + suffix) for suffix in _SIDE_FILES]
    for left in files:
        left.unlink(missing_ok=True)
    try:
        store: Any = SqlAlchemyStore(sqlite_uri(new), DEFAULT_LOCAL_FILE_AND_ARTIFACT_PATH)  # type: ignore[no-untyped-call]
        store.engine.dispose()
        new.replace(target)
    finally:
        for left in files:
            left.unlink(missing_ok=True)


def _hint(database: Path, error: Exception) -> str:
    text = str(error)
    if "disk is full" in text or "No space left" in text or "disk I/O error" in text:
        return f"free some space at {database.parent} and run again; nothing half-made is left"
    return "if another version of MLflow made it, run `mlflow db upgrade`; else move it away, a new one is made"


def _artifact_location(tracking_uri: str) -> Any:
    database = sqlite_file(tracking_uri)
    return None if database is None else (database.resolve().parent / "mlartifacts").as_uri()
