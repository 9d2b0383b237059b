"""Several writers, and writers that die: nobody's work is lost, and no half folder looks whole."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from skd_lib import storage
from skd_lib.errors import SkdError, Transient
from tests.support.storage_server import Fault, Server, Store

from .faults import (
    CHUNK,
    FOLDER,
    LARGE,
    MARKER,
    NAME,
    NEW,
    URI,
    first,
    keep,
    kept,
    nothing_goes_wrong,
    nth,
    stored,
    tree,
    version,
    written,
)


@pytest.mark.usefixtures("serial")
@pytest.mark.parametrize("before", ["nothing", "a whole model"])
def test_a_writer_that_dies_at_any_request_leaves_no_half_folder_that_looks_whole(
    before: str, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From one request on nothing arrives any more; then a reader looks, and the next attempt completes the folder."""
    store, old, new = server.store, version("old") if before == "a whole model" else {}, version("new")
    folder = written(new, tmp_path / "model")
    states = set()
    for number in itertools.count(1):
        keep(store, old)
        monkeypatch.setenv("SKD_STORAGE_DEADLINE", "0.01")
        store.fault = nth(store, number, "lost", afterwards="lost")
        try:
            storage.upload(folder, FOLDER, last=MARKER)
        except SkdError:
            finished = False
        else:
            finished = True
        everything_arrived = store.requests.total() < number

        monkeypatch.setenv("SKD_STORAGE_DEADLINE", "10")
        store.fault = nothing_goes_wrong
        found = stored(store)
        assert all(content in {old.get(name), new[name]} for name, content in found.items())  # each file is whole
        assert not finished or found == new
        if MARKER in found:
            assert found in (old, new)
        states.add("old" if found == old else "new" if found == new else "in between")

        if found != old:  # else it is an upload like the first
            storage.upload(folder, FOLDER, last=MARKER)
            assert stored(store) == new
        if everything_arrived:
            break
    assert states == {"old", "in between", "new"}


@pytest.mark.parametrize("size", [100, LARGE])
@pytest.mark.parametrize("before", [b"", b"old"])
def test_of_two_writers_one_wins_and_the_other_is_told(
    before: bytes, size: int, server: Server, tmp_path: Path
) -> None:
    store, together, kind = server.store, threading.Barrier(2), "multipart" if size == 100 else "start"
    if before:
        store.put(NAME, before)
    # Both have begun before one ends: the first two requests that write wait for each other.
    store.before = lambda asked: together.wait(10) and None if asked == kind and store.requests[kind] <= 2 else None
    files = [tmp_path / "one", tmp_path / "two"]
    for file in files:
        file.write_bytes((file.name.encode() * size)[:size])

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
    assert "another process wrote this object in the meantime" in told.what
    assert str(loser) in told.hint
    assert store.seen[NAME] == [*([before] if before else []), winner.read_bytes()]
    assert len(loser.read_bytes()) == size


def test_a_retry_does_not_undo_what_another_has_written(store: Store, file: Path) -> None:
    """The answer to the request is lost, and before the retry another process replaces the object."""

    def fault(kind: str, count: int) -> Fault:
        if kind == "multipart" and count == 2:
            store.put(NAME, b"somebody else's, later")
        return "answer lost" if kind == "multipart" and count == 1 else None

    store.fault = fault
    file.write_bytes(b"ours")
    with pytest.raises(SkdError, match="another process wrote this object"):
        storage.upload(file, URI)
    assert store.seen[NAME] == [b"old", b"ours", b"somebody else's, later"]


@pytest.mark.parametrize("theirs", [b"somebody else's", None])
def test_what_another_does_while_a_file_is_sent_stays(theirs: bytes | None, store: Store, file: Path) -> None:
    def fault(kind: str, count: int) -> Fault:
        if kind == "chunk" and count == 2:
            store.put(NAME, theirs) if theirs else store.objects.pop(NAME)
        return None

    store.fault = fault
    with pytest.raises(SkdError, match=r"another process (wrote this object in the meantime|deleted it)") as caught:
        storage.upload(file, URI)
    assert ("wrote" in caught.value.what) == (theirs is not None)
    assert store.content(NAME) == theirs


@pytest.mark.usefixtures("serial")
@pytest.mark.parametrize("before", ["nothing", "a whole model"])
def test_a_folder_that_another_has_completed_meanwhile_stays(before: str, server: Server, tmp_path: Path) -> None:
    store, theirs = server.store, version("theirs")
    if before == "a whole model":
        for name, content in version("old").items():
            store.put(f"model/{name}", content)

    def complete(kind: str) -> None:
        if kind == "chunk" and store.requests["chunk"] == 1:
            for name, content in theirs.items():
                store.put(f"model/{name}", content)

    store.before = complete
    with pytest.raises(SkdError, match="another process wrote this object") as caught:
        storage.upload(written(version("new"), tmp_path / "model"), FOLDER, last=MARKER)
    assert caught.value.where == f"{FOLDER}/large.safetensors"
    assert stored(store) == theirs
    assert store.objects.keys() == {f"model/{name}" for name in theirs}


def test_what_is_replaced_while_it_is_read_is_not_mixed(store: Store, tmp_path: Path) -> None:
    store.put(NAME, NEW)
    store.fault = lambda kind, count: "cut" if kind == "media" and count == 1 else None
    store.before = lambda kind: store.put(NAME, NEW[::-1]) if kind == "media" and store.requests["media"] == 2 else None
    for read in (
        lambda: storage.download(URI, tmp_path / "copy"),
        lambda: storage.download("gs://bucket/models", tmp_path / "copy"),
        lambda: storage.read_bytes(URI),
    ):
        store.requests.clear()
        with pytest.raises(storage.Missing, match="replaced or deleted while it was read") as caught:
            read()
        assert caught.value.exit_code == Transient.exit_code  # a node of a TrainJob reads it again
    assert list(tmp_path.iterdir()) == []
    store.fault = nothing_goes_wrong
    store.before = lambda _kind: None
    with storage.open_binary(URI) as stream:
        assert stream.read(1000) == NEW[::-1][:1000]
        stream.seek(LARGE)
        store.put(NAME, NEW)
        stream.seek(0)
        with pytest.raises(Exception, match="no models/student"):
            stream.read()


@pytest.mark.parametrize("fault", ["lost", 503])
def test_of_many_who_create_an_object_one_succeeds(fault: Fault, server: Server) -> None:
    store, together = server.store, threading.Barrier(8)
    store.before = lambda _kind: None if store.requests["multipart"] > 8 else together.wait(10) and None
    store.fault = lambda kind, count: fault if kind == "multipart" and count <= 8 else None
    contents = [f"writer {number}".encode() for number in range(8)]
    with ThreadPoolExecutor(8) as pool:
        generations = list(pool.map(lambda content: storage.create_object(URI, content), contents))
    (winner,) = [number for number, generation in enumerate(generations) if generation is not None]
    assert store.seen == {NAME: [contents[winner]]}
    assert str(store.objects[NAME][1]) == generations[winner]


def test_conditions_hold_when_answers_are_lost(store: Store) -> None:
    present = str(store.objects[NAME][1])
    store.fault = first("multipart", "answer lost")
    # The request that is repeated finds what the first has done; its content tells whose that is.
    assert storage.create_object(URI, b"mine", replacing=present) is None
    assert storage.read_bytes(URI) == b"mine"
    assert storage.create_object(URI, b"again", replacing=present) is None
    storage.delete_object(URI, present)
    assert store.seen[NAME] == [b"old", b"mine"]
    store.requests.clear()
    store.fault = first("delete", "answer lost")
    storage.delete_object(URI, str(store.objects[NAME][1]))
    assert store.objects == {}


def test_a_writer_that_is_killed_leaves_the_old_object(server: Server, store: Store, file: Path) -> None:
    reached = threading.Event()

    def hang(kind: str) -> None:
        if kind == "chunk" and store.requests["chunk"] == 3:
            reached.set()
            time.sleep(3)

    store.before = hang
    # A request whose sender is dead has not arrived.
    store.fault = lambda kind, count: "lost" if kind == "chunk" and count > 2 else None
    script = (
        "from pathlib import Path; from google.cloud.storage import blob; from skd_lib import storage; "
        f"from skd_lib.storage import gcs; blob._MAX_MULTIPART_SIZE = gcs.CHUNK_BYTES = {CHUNK}; "  # as in `server`
        f"storage.upload(Path({str(file)!r}), {URI!r})"
    )
    process = subprocess.Popen([sys.executable, "-c", script], env=os.environ)
    assert reached.wait(60)
    process.send_signal(signal.SIGKILL)
    process.wait(10)
    assert store.seen == {NAME: [b"old"]}
    assert storage.file_sizes("gs://bucket/models") == {"student.safetensors": 3}


def test_a_writer_that_is_killed_between_two_files_leaves_a_folder_without_its_marker(
    server: Server, tmp_path: Path
) -> None:
    store, old, new = server.store, version("old"), version("new")
    for name, content in old.items():
        store.put(f"model/{name}", content)
    folder = written(new, tmp_path / "model")
    store.fault = lambda kind, count: "lost" if kind == "multipart" and count > 1 else None
    script = (
        "from pathlib import Path; from skd_lib import storage; "
        f"storage.upload(Path({str(folder)!r}), {FOLDER!r}, last={MARKER!r})"
    )
    process = subprocess.Popen([sys.executable, "-c", script], env={**os.environ, "SKD_STORAGE_DEADLINE": "60"})
    patience = time.monotonic() + 60
    while not any(kept(store).get(name) == content for name, content in new.items()):
        assert time.monotonic() < patience
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait(10)
    found = stored(store)
    assert found.keys() == new.keys() - {MARKER}
    assert sorted(found[name] == new[name] for name in found) == [False, True]
    assert all(found[name] in {old[name], new[name]} for name in found)

    store.fault = nothing_goes_wrong
    storage.upload(folder, FOLDER, last=MARKER)
    assert tree(storage.download(FOLDER, tmp_path / "copy")) == new
