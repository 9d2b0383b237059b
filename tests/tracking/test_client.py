"""Sqlite files are whole or not there, whatever their path and however a process ends; what is no MLflow is silence."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import mlflow.store.db.utils
import pytest
from mlflow.store.tracking.dbmodels.initial_models import Base
from sqlalchemy import create_engine

from skd_lib._core.uris import sqlite_file, sqlite_uri
from skd_lib.errors import SkdError
from skd_lib.tracking import client
from skd_lib.tracking.client import check_tracking, connect
from skd_lib.tracking.outbox import FOLDER_VARIABLE, read_location, waiting_files
from skd_lib.tracking.runs import step_run
from tests.support import http

from .conftest import EXPERIMENT


def _half_made(path: Path) -> None:
    engine = create_engine(sqlite_uri(path))
    Base.metadata.create_all(engine)
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE alembic_version (version_num VARCHAR(32))")
        connection.exec_driver_sql("CREATE TABLE _alembic_tmp_model_versions (name VARCHAR(256))")
    engine.dispose()


@pytest.mark.parametrize("death", [KeyboardInterrupt, OSError])
def test_a_process_that_ends_while_tables_are_made_leaves_no_database(
    death: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    database = tmp_path / "mlflow.db"

    def die(_: object) -> None:
        assert not database.exists()
        raise death

    monkeypatch.setattr(mlflow.store.db.utils, "_upgrade_db", die)
    with pytest.raises((KeyboardInterrupt, SkdError)):
        connect(f"sqlite:///{database}")
    assert {path.name for path in tmp_path.iterdir()} == {"mlflow.db.lock"}


def test_what_a_killed_process_left_under_the_other_name_is_made_again(tmp_path: Path) -> None:
    _half_made(tmp_path / ".mlflow.db.new")
    (tmp_path / ".mlflow.db.new-journal").write_bytes(b"left")
    assert check_tracking(f"sqlite:///{tmp_path}/mlflow.db") is None
    assert {path.name for path in tmp_path.iterdir()} == {"mlflow.db", "mlflow.db.lock"}


def test_a_half_made_database_of_another_process_is_refused_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mlflow.store.db.utils, "MAX_RETRY_COUNT", 1)
    _half_made(tmp_path / "mlflow.db")
    with pytest.raises(SkdError, match="MLflow cannot open the sqlite file") as caught:
        connect(f"sqlite:///{tmp_path}/mlflow.db")
    assert "move it away, a new one is made" in caught.value.hint


@pytest.mark.parametrize("name", ["feature%2Fx", "what?", "a b", "no#1", "100%", "漢", "100% new#2: 漢?"])
def test_any_path_may_hold_a_store(name: str, empty_store: Path, tmp_path: Path) -> None:
    folder = tmp_path / name / "runs"
    folder.mkdir(parents=True)
    if "new" not in name:  # MLflow takes seconds to make its tables
        shutil.copyfile(empty_store, folder / "mlflow.db")
    uri = sqlite_uri(folder / "mlflow.db")
    assert sqlite_file(uri) == folder / "mlflow.db"
    with step_run(step="s", tracking_uri=uri, experiment=EXPERIMENT) as run:
        run.log_text("kept", "note.txt")
    assert connect(uri).get_run(run.run_id).info.status == "FINISHED"
    (note,) = folder.rglob("note.txt")
    assert note.read_text() == "kept"
    assert [path.name for path in tmp_path.iterdir()] == [name]  # nothing under a name that is quoted, or cut off


@pytest.mark.parametrize(
    ("uri", "file"),
    [
        ("sqlite:///runs/x.db", "runs/x.db"),
        ("sqlite+pysqlite:////a/x.db?timeout=5", "/a/x.db"),
        ("sqlite:///file:/a%2520b/x.db?uri=true", "/a b/x.db"),
        ("sqlite:///:memory:", None),
        ("sqlite://", None),
        ("http://host/x.db", None),
    ],
)
def test_the_file_of_any_sqlite_uri(uri: str, file: str | None) -> None:
    assert sqlite_file(uri) == (file and Path(file))


@pytest.mark.parametrize("answer", [b"{}", b"", b'{"experiment": 7, "experiments": 5}', b"[]", b"<html>log in</html>"])
def test_what_answers_in_the_place_of_mlflow_is_no_store(
    answer: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Answers(http.Handler):
        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("content-length", 0)))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(answer)

        do_POST = do_GET

    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    with http.Server(Answers) as server:
        assert "MLflow does not answer" in str(check_tracking(server.url, "skd"))
        with step_run(step="distill", tracking_uri=server.url, experiment="skd") as run:
            run.log_metrics({"loss": 1.0}, step=1)
    assert [read_location(Path(file)).step for file in waiting_files(str(tmp_path))] == ["distill"]


def test_a_server_is_reached_with_mlflow_skinny(monkeypatch: pytest.MonkeyPatch) -> None:
    """The images of COMET and of the pipeline have it, which comes without what opens databases."""
    for name in ("sqlalchemy", "sqlalchemy.exc", "alembic", "alembic.migration"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "mlflow.store.db.utils")
    assert connect("http://127.0.0.1:9").tracking_uri == "http://127.0.0.1:9"
    assert issubclass(ConnectionError, client.unanswered())
