"""Sqlite files are whole or not there, whatever their path and however a process ends; what is no MLflow is silence."""

from __future__ import annotations

import shutil
import sqlite3
import sys
import threading
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import mlflow.store.db.utils
import pytest
from mlflow.store.tracking.dbmodels.initial_models import Base
from sqlalchemy import create_engine

from skd_lib._core.uris import sqlite_file, sqlite_uri
from skd_lib.errors import SkdError
from skd_lib.tracking import client
from skd_lib.tracking.buffer import FOLDER_VARIABLE, read_place, waiting_files
from skd_lib.tracking.client import check_tracking, connect
from skd_lib.tracking.runs import step_run

from .conftest import EXPERIMENT


@pytest.fixture
def quick(empty_store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """New databases are copies of an empty one."""
    monkeypatch.setattr(client, "_make", lambda database: shutil.copyfile(empty_store, database))


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


@pytest.mark.parametrize("content", ["tables", "nothing"])
def test_a_half_made_database_is_set_aside_with_a_message(
    content: str, quick: None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    database = tmp_path / "mlflow.db"
    if content == "tables":
        _half_made(database)
    else:
        database.touch()
    (tmp_path / "mlflow.db.incomplete-1").touch()
    before = database.read_bytes()
    assert check_tracking(f"sqlite:///{database}") is None
    assert (tmp_path / "mlflow.db.incomplete-2").read_bytes() == before
    assert f"{database} had no records" in caplog.text


def test_databases_with_records_and_of_others_are_left_alone(quick: None, store: str, tmp_path: Path) -> None:
    with step_run(step="s", tracking_uri=store, experiment=EXPERIMENT):
        pass
    mine = sqlite_file(store)
    assert mine is not None
    with closing(sqlite3.connect(mine)) as connection, connection:
        connection.execute("DROP TABLE trace_info")  # as in an older version of MLflow
    other, text = tmp_path / "other.db", tmp_path / "text.db"
    with closing(sqlite3.connect(other)) as connection, connection:
        connection.execute("CREATE TABLE recipes (name TEXT)")
    text.write_text("not a database, though of this name" * 50)
    for database in (mine, other, text):
        assert not client._is_half_made(database), database


@pytest.mark.parametrize("name", ["feature%2Fx", "what?", "a b", "no#1", "100%", "漢"])
def test_any_path_may_hold_a_store(name: str, quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / name / "runs"
    folder.mkdir(parents=True)
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
    class Answers(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("content-length", 0)))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(answer)

        do_POST = do_GET

        def log_message(self, *_: object) -> None:
            pass

    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        uri = f"http://127.0.0.1:{server.server_port}"
        try:
            assert "MLflow does not answer" in str(check_tracking(uri, "skd"))
            with step_run(step="distill", tracking_uri=uri, experiment="skd") as run:
                run.log_metrics({"loss": 1.0}, step=1)
        finally:
            server.shutdown()
    assert [read_place(Path(file)).step for file in waiting_files(str(tmp_path))] == ["distill"]


def test_a_server_is_reached_with_mlflow_skinny(monkeypatch: pytest.MonkeyPatch) -> None:
    """The images of COMET and of the pipeline have it, which comes without what opens databases."""
    for name in ("sqlalchemy", "sqlalchemy.exc", "alembic", "alembic.migration"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "mlflow.store.db.utils")
    assert connect("http://127.0.0.1:9").tracking_uri == "http://127.0.0.1:9"
    assert issubclass(ConnectionError, client.unanswered())
