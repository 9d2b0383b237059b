"""Object storage that fails: whatever happens, an object is the old one or the new one, and nobody's work is lost."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from skd_lib import storage
from skd_lib.errors import SkdError
from skd_lib.storage import gcs, transfers

from .storage_server import Fault, Server, Store

LARGE = 700_000  # three chunks of a resumable upload, see `server`
NEW = bytes(range(256)) * (LARGE // 256)
URI = "gs://bucket/models/student.safetensors"
NAME = "models/student.safetensors"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A store, with small chunks and little patience."""
    server = Server()
    server.start()
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.address)
    monkeypatch.setenv("SKD_STORAGE_DEADLINE", "10")
    monkeypatch.setattr("google.cloud.storage.blob._MAX_MULTIPART_SIZE", 256 * 1024)
    monkeypatch.setattr(gcs, "_CHUNK", 256 * 1024)
    yield server
    server.stop()


@pytest.fixture
def store(server: Server) -> Store:
    """What the server keeps, with an old object at `NAME`."""
    server.store.put(NAME, b"old")
    return server.store


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "student.safetensors"
    path.write_bytes(NEW)
    return path


def first(kind: str, fault: Fault, times: int = 1) -> Callable[[str, int], Fault]:
    return lambda asked, count: fault if asked == kind and count <= times else None


def always(kind: str, fault: Fault) -> Callable[[str, int], Fault]:
    return lambda asked, _count: fault if asked == kind else None


def left_behind(store: Store) -> list[str]:
    return [name for name in store.objects if name.endswith(".skd-upload")]


@pytest.mark.parametrize("fault", ["lost", "answer lost", 503, 429])
@pytest.mark.parametrize("kind", ["stat", "start", "chunk", "rewrite", "delete"])
def test_an_upload_survives_an_interruption_at_every_stage(kind: str, fault: Fault, store: Store, file: Path) -> None:
    store.fault = first(kind, fault)
    storage.upload(file, URI)
    assert store.requests[kind] >= 2
    assert store.seen[NAME][0] == b"old"
    assert set(store.seen[NAME]) == {b"old", NEW}  # never a part
    assert store.content(NAME) == NEW
    assert left_behind(store) == []


@pytest.mark.parametrize("kind", ["stat", "start", "chunk", "rewrite"])
def test_an_upload_that_fails_for_good_leaves_the_old_object(
    kind: str, store: Store, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SKD_STORAGE_DEADLINE", "0.5")
    store.fault = always(kind, 503)
    with pytest.raises(SkdError, match="Google Cloud Storage failed") as caught:
        storage.upload(file, URI)
    assert "SKD_STORAGE_DEADLINE (now 0.5 seconds)" in caught.value.hint
    assert store.seen[NAME] == [b"old"]
    assert left_behind(store) == []
    assert file.read_bytes() == NEW


def test_what_cannot_be_cleaned_up_is_named_and_deleted_with_its_folder(
    store: Store, file: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("SKD_STORAGE_DEADLINE", "0.5")
    store.fault = always("delete", 503)
    storage.upload(file, URI)
    assert store.content(NAME) == NEW
    (temporary,) = left_behind(store)
    assert f"{temporary} stays behind" in caplog.text
    assert storage.file_sizes("gs://bucket/models") == {"student.safetensors": len(NEW)}
    assert [item.uri for item in storage.list_objects("gs://bucket/models")] == [URI]
    store.fault = lambda _kind, _count: None
    storage.delete("gs://bucket/models")
    assert store.objects == {}


@pytest.mark.parametrize("fault", ["lost", "cut", 503])
def test_a_download_survives_an_interruption(fault: Fault, store: Store, tmp_path: Path) -> None:
    store.put(NAME, NEW)
    store.fault = first("media", fault, times=2)
    assert storage.download(URI, tmp_path / "copy").read_bytes() == NEW
    assert store.requests["media"] == 3
    assert storage.read_bytes(URI) == NEW


@pytest.mark.parametrize("small", [True, False])
def test_a_corrupted_upload_is_sent_again(small: bool, store: Store, file: Path) -> None:
    content = NEW[:1000] if small else NEW
    file.write_bytes(content)
    store.fault = first("multipart" if small else "chunk", "corrupt")
    storage.upload(file, URI)
    assert store.seen[NAME] == [b"old", content]
    store.fault = always("multipart" if small else "chunk", "corrupt")
    with pytest.raises(SkdError, match="corrupted: 3 times in a row"):
        storage.upload(file, URI)
    assert store.seen[NAME] == [b"old", content]
    assert left_behind(store) == []


def test_a_corrupted_download_is_fetched_again(store: Store, tmp_path: Path) -> None:
    store.put(NAME, NEW)
    store.fault = first("media", "corrupt")
    assert storage.download(URI, tmp_path / "copy").read_bytes() == NEW
    store.fault = always("media", "corrupt")
    for action in (lambda: storage.download(URI, tmp_path / "other"), lambda: storage.read_bytes(URI)):
        with pytest.raises(SkdError, match="the transfer was corrupted") as caught:
            action()
        assert caught.value.where == URI
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy"]


def test_a_model_goes_through_a_storm(store: Store, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for number in range(8):
        (folder / f"model-{number}.safetensors").write_bytes(NEW[: 40_000 * number])
    (folder / "index.json").write_text("{}", encoding="utf-8")
    chance = random.Random(0)
    store.fault = lambda _kind, _count: chance.choice([429, 503, "lost", "answer lost", *[None] * 8])
    storage.upload(folder, "gs://bucket/model", last="index.json")
    copy = storage.download("gs://bucket/model", tmp_path / "copy")
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == {
        path.name: path.read_bytes() for path in folder.iterdir()
    }
    assert store.objects["model/index.json"][1] > max(
        generation for name, (_, generation) in store.objects.items() if name.endswith(".safetensors")
    )
    assert left_behind(store) == []


def test_no_object_of_a_folder_changes_before_all_have_arrived(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SKD_STORAGE_DEADLINE", "0.5")
    folder = tmp_path / "models"
    folder.mkdir()
    (folder / "student.safetensors").write_bytes(b"new")
    (folder / "large.safetensors").write_bytes(NEW)
    store.fault = always("chunk", 503)
    with pytest.raises(SkdError, match="Google Cloud Storage failed"):
        storage.upload(folder, "gs://bucket/models")
    assert {name: content for name, (content, _) in store.objects.items()} == {NAME: b"old"}


def test_of_two_writers_one_wins_and_the_other_is_told(store: Store, tmp_path: Path) -> None:
    together = threading.Barrier(2)
    store.before = lambda kind: together.wait(10) and None if kind == "rewrite" else None
    files = [tmp_path / "one", tmp_path / "two"]
    for file in files:
        file.write_bytes(file.name.encode() * 100)

    def write(file: Path) -> SkdError | None:
        try:
            storage.upload(file, URI)
        except SkdError as error:
            return error
        return None

    with ThreadPoolExecutor(2) as pool:
        outcomes = list(pool.map(write, files))
    (told,) = [outcome for outcome in outcomes if outcome is not None]
    winner, loser = files if outcomes[0] is None else files[::-1]
    assert "somebody else wrote this object in the meantime" in told.what
    assert str(loser) in told.hint
    assert store.seen[NAME] == [b"old", winner.read_bytes()]
    assert loser.read_bytes() == loser.name.encode() * 100
    assert left_behind(store) == []


def test_a_retry_does_not_undo_what_another_has_written(store: Store, file: Path) -> None:
    """The answer to the rewrite is lost, and before the retry somebody else replaces the object."""

    def fault(kind: str, count: int) -> Fault:
        if kind == "rewrite" and count == 2:
            store.put(NAME, b"somebody else's, later")
        return "answer lost" if kind == "rewrite" and count == 1 else None

    store.fault = fault
    with pytest.raises(SkdError, match="somebody else wrote this object"):
        storage.upload(file, URI)
    assert store.seen[NAME] == [b"old", NEW, b"somebody else's, later"]


def test_a_store_that_is_gone_for_a_while(server: Server, store: Store, file: Path, tmp_path: Path) -> None:
    def stop(kind: str, count: int) -> Fault:
        if kind != "chunk" or count != 2:
            return None
        threading.Thread(target=interrupt).start()
        return "lost"

    def interrupt() -> None:
        server.stop()
        time.sleep(1.5)
        server.start()

    store.fault = stop
    started = time.monotonic()
    storage.upload(file, URI)
    assert time.monotonic() - started > 1.5
    assert store.seen[NAME] == [b"old", NEW]
    server.stop()
    threading.Timer(1.0, server.start).start()
    assert storage.download(URI, tmp_path / "copy").read_bytes() == NEW


def test_a_writer_that_is_killed_leaves_the_old_object(server: Server, store: Store, file: Path) -> None:
    reached = threading.Event()

    def hang(kind: str) -> None:
        if kind == "rewrite":
            reached.set()
            time.sleep(3)

    store.before = hang
    store.fault = always("rewrite", "lost")  # a request whose sender is dead has not arrived
    script = f"from pathlib import Path; from skd_lib import storage; storage.upload(Path({str(file)!r}), {URI!r})"
    process = subprocess.Popen([sys.executable, "-c", script], env=os.environ)
    assert reached.wait(60)
    process.send_signal(signal.SIGKILL)
    process.wait(10)
    assert store.seen[NAME] == [b"old"]
    assert len(left_behind(store)) == 1
    assert storage.file_sizes("gs://bucket/models") == {"student.safetensors": 3}


def test_long_transfers_tell_how_far_they_are(
    store: Store, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(transfers, "PROGRESS_FROM", 100_000)
    monkeypatch.setenv("SKD_EVENTS", "1")
    storage.upload(file, URI)
    storage.download(URI, tmp_path / "copy")
    storage.upload(tmp_path / "copy", "gs://bucket/other")
    events = [json.loads(line.removeprefix("::skd ")) for line in capsys.readouterr().out.splitlines()]
    for what in ("uploading student.safetensors", "fetching copy", "uploading copy"):
        told = [event["done"] for event in events if event["what"] == what]
        assert told[-1] == len(NEW)
        assert len(told) > 2


@pytest.mark.parametrize("text", ["soon", "-1", "inf"])
def test_a_deadline_is_a_number_of_seconds(text: str, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SKD_STORAGE_DEADLINE", text)
    with pytest.raises(SkdError, match="not a number of seconds"):
        storage.exists(URI)


def test_other_storage_says_what_to_install() -> None:
    pytest.importorskip("fsspec")
    with pytest.raises(SkdError, match="oci:// needs another package: ocifs") as caught:
        storage.exists("oci://bucket/file")
    assert caught.value.hint == "pip install ocifs"
