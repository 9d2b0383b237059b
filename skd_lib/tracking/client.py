"""The connection to MLflow: quiet, without telemetry, with short waits, and only to stores that MLflow still starts.

Functions that ask the store raise `MlflowException` where it does not answer, and `ConnectionError` where something
else answers in its place.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit, urlunsplit

from skd_lib._core.uris import redacted, shown, sqlite_file, sqlite_uri
from skd_lib.errors import SkdError

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
_SIDE_FILES = ("", "-journal", "-wal", "-shm")
_HINT = "use `sqlite:///runs/mlflow.db` on one machine, or the `http(s)://` address of a tracking server"
_OWN = {
    "SKD_MLFLOW_USERNAME": "MLFLOW_TRACKING_USERNAME",
    "SKD_MLFLOW_PASSWORD": "MLFLOW_TRACKING_PASSWORD",
    "SKD_MLFLOW_TOKEN": "MLFLOW_TRACKING_TOKEN",
}
"""MLflow's variable by ours."""
_KUBEFLOWS_MLFLOW = "KFP_MLFLOW_CONFIG"
"""Set by KFP's integration (`EnvMLflowConfig` in backend/src/common/plugins/mlflow): JSON with its server's address."""

PARAM_LENGTH = 6000
"""Longest parameter that MLflow takes."""
TAG_LENGTH = 5000
"""Longest tag that older servers take; newer ones take 8000."""


class Deleted(SkdError):
    """The experiment was deleted: MLflow takes nothing for it until it is restored."""


def quieten() -> None:
    """Set what MLflow reads from the environment; to be called before it is imported."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def connect(tracking_uri: str) -> MlflowClient:
    """Return a client of the tracking store; a sqlite file and its folder are created. A server is not contacted yet.

    Args:
        tracking_uri: `sqlite:///FILE`, the URL of a tracking server, or another database URL.

    Raises:
        SkdError: MLflow is not installed, cannot use this URI, or the sqlite file cannot be created or opened.
        SQLAlchemyError: a database server does not answer.
    """
    where = store_name(tracking_uri)
    _check_uri(tracking_uri)
    quieten()
    use_credentials(tracking_uri)
    try:
        from mlflow import MlflowClient
    except ImportError as error:
        hint = "install the extra `tracking`, or leave the tracking URI empty to run without tracking"
        raise SkdError(f"MLflow is not installed ({error})", where=where, hint=hint) from error
    logging.getLogger("alembic").setLevel(logging.WARNING)
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # one line a retry; ours is one in all
    database = sqlite_file(tracking_uri)
    if database is None:
        return _connect_to_server(tracking_uri)
    try:
        with _locked(database):
            if not database.exists():
                _make(database)
            return MlflowClient(tracking_uri=tracking_uri, registry_uri=tracking_uri)
    except unanswered() as error:
        full = any(text in str(error) for text in ("disk is full", "No space left", "disk I/O error"))
        hint = (
            f"free some space at {database.parent} and run again; nothing half-made is left"
            if full
            else "if another version of MLflow made it, run `mlflow db upgrade`; else move it away, a new one is made"
        )
        raise SkdError(f"MLflow cannot open the sqlite file: {brief(error)}", where=where, hint=hint) from error


def _connect_to_server(tracking_uri: str) -> MlflowClient:
    from mlflow import MlflowClient

    where = store_name(tracking_uri)
    try:
        if not tracking_uri.startswith(("http://", "https://")):  # else a database, which mlflow-skinny does not know
            import mlflow.store.db.utils

            mlflow.store.db.utils.MAX_RETRY_COUNT = _DATABASE_ATTEMPTS
        return MlflowClient(tracking_uri=tracking_uri, registry_uri=tracking_uri)
    except ImportError as error:
        what = f"the Python package `{error.name}`, by which this database is reached, is not installed"
        hint = f"`pip install {error.name}`, or name another driver in the URI"
        raise SkdError(what, where=where, hint=hint) from error
    except ValueError as error:
        raise SkdError(f"not the URI of a store: {brief(error)}", where=where, hint=_HINT) from error


def use_credentials(tracking_uri: str) -> None:
    """Leave in this process's environment the credentials for one server; other processes are not touched.

    KFP 2.17's MLflow integration puts the credentials of its server into the variables that MLflow's client reads, and
    its launcher, which runs in the step's container, uses them. So a Secret of ours must not fill the same variables,
    and what they hold must not be sent to another server.
    """
    own = {name: value for variable, name in _OWN.items() if (value := os.environ.get(variable))}
    try:
        config = json.loads(os.environ.get(_KUBEFLOWS_MLFLOW) or "{}")
    except ValueError:
        config = {}
    endpoint = str(config.get("endpoint") or "") if isinstance(config, dict) else ""
    foreign = bool(endpoint) and _server(endpoint) != _server(tracking_uri)
    for name in (*_OWN.values(), "MLFLOW_TRACKING_AUTH") if own or foreign else ():
        os.environ.pop(name, None)
    if foreign:
        os.environ.pop("MLFLOW_WORKSPACE", None)
    os.environ.update(own)


def _server(uri: str) -> tuple[str, str, int | None, str]:
    try:
        parts = urlsplit(uri)
        port = parts.port or {"http": 80, "https": 443}.get(parts.scheme)
    except ValueError:  # no URL
        return "", uri, None, ""
    return parts.scheme, parts.hostname or "", port, parts.path.rstrip("/")


def find_experiment(client: MlflowClient, name: str) -> Experiment | None:
    """Return the experiment of a name, deleted or not; None if there is none."""
    experiment = client.get_experiment_by_name(name)
    if experiment is not None and not experiment.experiment_id:  # to MLflow's client `{}` is an experiment
        raise ConnectionError("what answers there is no MLflow")
    return experiment


def find_or_create_experiment(client: MlflowClient, tracking_uri: str, name: str) -> str:
    """Return the experiment's id; several processes may ask for a new one at once.

    Artifacts of a sqlite store go to the folder `mlartifacts` next to its file; a server decides for itself.
    """
    from mlflow.exceptions import MlflowException

    experiment = find_experiment(client, name)
    if experiment is None:
        database = sqlite_file(tracking_uri)
        location: Any = None if database is None else (database.resolve().parent / "mlartifacts").as_uri()
        try:
            # The kind makes MLflow's page open with training runs rather than with traces of language-model calls.
            kind = {"mlflow.experimentKind": "custom_model_development"}
            return str(client.create_experiment(name, artifact_location=location, tags=kind))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            experiment = find_experiment(client, name)  # another process was faster
    if experiment is None:
        raise ConnectionError(f"the experiment {name} is there, and is not")
    check_not_deleted(experiment, tracking_uri)
    return str(experiment.experiment_id)


def check_not_deleted(experiment: Experiment, tracking_uri: str) -> None:
    """Raise `Deleted` for an experiment that was deleted, to which MLflow takes nothing."""
    if experiment.lifecycle_stage == "deleted":
        raise Deleted(
            f"the MLflow experiment `{experiment.name}` was deleted",
            where=store_name(tracking_uri),
            hint=f"restore it (`mlflow experiments restore --experiment-id {experiment.experiment_id}`), remove it for "
            "good (`mlflow gc`), or use another name",
        )


def server_address(tracking_uri: str) -> str:
    """Return a server's address, without the URI's credentials and query; empty where the store is no server."""
    parts = urlsplit(shown(tracking_uri))
    if parts.scheme not in ("http", "https"):
        return ""
    return urlunsplit((parts.scheme, parts.netloc, parts.path.rstrip("/"), "", ""))


def run_url(tracking_uri: str, run: Run) -> str:
    """Return the address of a run's page, without the URI's credentials; empty where the store is no server."""
    server = server_address(tracking_uri)
    return f"{server}/{run_page(run)}" if server else ""


def run_page(run: Run) -> str:
    """Return the same below the address of a server."""
    return f"#/experiments/{run.info.experiment_id}/runs/{run.info.run_id}"


def check_tracking(tracking_uri: str, experiment: str = "") -> SkdError | None:
    """Return what is wrong with the tracking store or (deleted) the experiment; None if nothing is."""
    try:
        client = connect(tracking_uri)
        client.search_experiments(max_results=1)
        if experiment and client.get_experiment_by_name(experiment) is not None:
            find_or_create_experiment(client, tracking_uri, experiment)
    except SkdError as error:
        return error
    except unanswered() as error:
        is_server = tracking_uri.startswith(("http://", "https://"))
        hint = "start it, or check the address, the network and the credentials" if is_server else _HINT
        return SkdError(f"MLflow does not answer: {brief(error)}", where=store_name(tracking_uri), hint=hint)
    return None


def unanswered() -> tuple[type[Exception], ...]:
    """Return the errors of MLflow's client where the store refuses a request, answers badly or does not answer."""
    from google.protobuf.json_format import ParseError  # of an answer in JSON that is not MLflow's
    from mlflow.exceptions import MlflowException

    of_stores = (MlflowException, ParseError, OSError)  # requests' exceptions are OSErrors
    try:
        from sqlalchemy.exc import SQLAlchemyError
    except ImportError:  # with mlflow-skinny, by which servers only are reached
        return of_stores
    return (*of_stores, SQLAlchemyError)


def untaken() -> tuple[type[Exception], ...]:
    """Return the errors where the store does not take a step's records now, but may do so later."""
    return (Deleted, *unanswered())


def is_silence(error: Exception) -> bool:
    """Tell whether an error says that the store cannot answer now, rather than that it refuses the request."""
    from mlflow.exceptions import MlflowException

    return not isinstance(error, MlflowException) or error.error_code in (
        "INTERNAL_ERROR",
        "TEMPORARILY_UNAVAILABLE",
        "REQUEST_LIMIT_EXCEEDED",
        "ENDPOINT_NOT_FOUND",  # of a proxy in the place of a server that is away
    )


def brief(error: Exception) -> str:
    """Return an error's text in one line of moderate length, from its root cause on: MLflow nests errors in it."""
    text = " ".join(redacted(str(error)).split()) or type(error).__name__
    return clip(text[max(text.rfind("Caused by "), 0) :], 300)


def clip(text: str, length: int) -> str:
    """Return the text, shortened to a length."""
    return text if len(text) <= length else text[: length - 3] + "..."


def store_name(tracking_uri: str) -> str:
    """Return a store as messages name it."""
    return f"tracking URI `{shown(tracking_uri)}`"


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
def _locked(database: Path) -> Iterator[None]:
    """Keep other processes out: two that make the tables of one sqlite file at once both fail."""
    import fcntl

    with database.with_name(f"{database.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


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
