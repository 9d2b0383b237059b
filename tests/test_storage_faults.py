"""Object storage that fails: whatever happens, an object is the old one or the new one, and nobody's work is lost."""

from __future__ import annotations

import itertools
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

CHUNK = 256 * 1024
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
    monkeypatch.setattr("google.cloud.storage.blob._MAX_MULTIPART_SIZE", CHUNK)
    monkeypatch.setattr(gcs, "_CHUNK", CHUNK)
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


def nth(store: Store, number: int, fault: Fault, afterwards: Fault = None) -> Callable[[str, int], Fault]:
    """What goes wrong with request `number`, whatever it is, and with those after it."""

    def decide(_kind: str, _count: int) -> Fault:
        asked = store.requests.total()
        return fault if asked == number else afterwards if asked > number else None

    return decide


def nothing_goes_wrong(_kind: str, _count: int) -> Fault:
    return None


def left_behind(store: Store) -> list[str]:
    return [name for name in store.objects if name.endswith(".skd-upload")]


FOLDER = "gs://bucket/model"
SIZES = {"large.safetensors": CHUNK + 1000, "sub/small.safetensors": 2000, "complete": 1}
MARKER = "complete"


def version(text: str) -> dict[str, bytes]:
    """The files of a model, all different and each in one version."""
    return {name: (f"{text} {name} ".encode() * size)[: max(size, 20)] for name, size in SIZES.items()}


def written(files: dict[str, bytes], folder: Path) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def stored(store: Store) -> dict[str, bytes]:
    """What a reader of the model's folder finds."""
    return {name: store.objects[f"model/{name}"][0] for name in storage.file_sizes(FOLDER)}


def kept(store: Store) -> dict[str, bytes]:
    """The same, asked without a request."""
    return {
        name.removeprefix("model/"): content
        for name, (content, _) in dict(store.objects).items()
        if name.startswith("model/") and not name.endswith(".skd-upload")
    }


@pytest.fixture
def serial(monkeypatch: pytest.MonkeyPatch) -> None:
    """One request after the other, so that each run asks the same, and hardly a pause."""
    monkeypatch.setattr(transfers, "_WORKERS", 1)
    monkeypatch.setattr(gcs, "_PAUSES", (0.001, 0.01))


@pytest.mark.usefixtures("serial")
@pytest.mark.parametrize("fault", ["lost", "answer lost"])
def test_an_upload_survives_an_interruption_at_every_request(fault: Fault, server: Server, tmp_path: Path) -> None:
    """Each request of a folder's upload in turn: files sent whole and in pieces, rewrites of two calls, a marker."""
    store, old, new = server.store, version("old"), version("new")
    folder = written(new, tmp_path / "model")
    store.rewrite_calls = 2
    met: set[str] = set()
    for number in itertools.count(1):
        store.clear()
        for name, content in old.items():
            store.put(f"model/{name}", content)
        asked: list[str] = []
        store.before = asked.append
        store.fault = nth(store, number, fault)
        storage.upload(folder, FOLDER, last=MARKER)
        assert {name: store.seen[f"model/{name}"] for name in new} == {name: [old[name], new[name]] for name in new}
        assert store.objects.keys() == {f"model/{name}" for name in new}  # nothing is left behind
        assert max(store.objects, key=lambda name: store.objects[name][1]) == f"model/{MARKER}"
        if number > len(asked):
            break
        met.add(asked[number - 1])
    assert met == {"stat", "multipart", "start", "chunk", "rewrite", "delete"}


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
        store.clear()
        for name, content in old.items():
            store.put(f"model/{name}", content)
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


@pytest.mark.usefixtures("serial")
@pytest.mark.parametrize(
    ("action", "fault"),
    [
        *((action, "lost") for action in ("list", "ask", "download", "read", "stream", "delete")),
        ("delete", "answer lost"),
    ],
)
def test_reading_and_deleting_survive_an_interruption_at_every_request(
    action: str, fault: Fault, server: Server, tmp_path: Path
) -> None:
    store, files = server.store, version("new")
    store.page_size = 2  # so that a list takes two requests
    actions: dict[str, Callable[[], object]] = {
        "list": lambda: {item.uri.removeprefix(f"{FOLDER}/") for item in storage.list_objects(FOLDER)} == set(files),
        "ask": lambda: storage.exists(FOLDER) and not storage.exists("gs://bucket/mod"),
        "download": lambda: tree(storage.download(FOLDER, tmp_path / "copy")) == files,
        "read": lambda: storage.read_bytes(f"{FOLDER}/large.safetensors") == files["large.safetensors"],
        "stream": lambda: streamed(f"{FOLDER}/large.safetensors") == files["large.safetensors"],
        "delete": lambda: storage.delete(FOLDER) is None and set(store.objects) == {"model.txt"},
    }
    for number in itertools.count(1):
        store.clear()
        store.put("model.txt", b"another's")
        for name, content in files.items():
            store.put(f"model/{name}", content)
        store.fault = nth(store, number, fault)
        assert actions[action]()
        if number > store.requests.total():
            break
    assert number > 2


def tree(folder: Path) -> dict[str, bytes]:
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def streamed(uri: str) -> bytes:
    with storage.open_binary(uri) as stream:
        return b"".join(iter(lambda: stream.read(300_000), b""))


@pytest.mark.usefixtures("serial")
def test_a_storm_at_every_stage_is_weathered(store: Store, file: Path, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.write_bytes(b"small")
    store.page_size = 1
    statuses = [429, 503, 408, 500, 502, 504, 429, 503]
    store.fault = lambda _kind, count: statuses[count - 1] if count <= len(statuses) else None
    storage.upload(file, URI)
    storage.upload(small, "gs://bucket/models/small")
    assert storage.file_sizes("gs://bucket/models") == {"student.safetensors": len(NEW), "small": 5}
    assert storage.download(URI, tmp_path / "copy").read_bytes() == NEW
    storage.delete(URI)
    kinds = {"stat", "start", "chunk", "multipart", "rewrite", "list", "media", "delete"}
    assert {kind for kind, count in store.requests.items() if count > len(statuses)} == kinds
    assert store.seen[NAME] == [b"old", NEW]


@pytest.mark.parametrize(("status", "said"), [(403, "access denied"), (400, "failed")])
def test_what_asking_again_cannot_mend_fails_at_once(status: int, said: str, store: Store, file: Path) -> None:
    store.fault = lambda _kind, _count: status
    for action in (lambda: storage.upload(file, URI), lambda: storage.list_objects(URI)):
        store.requests.clear()
        with pytest.raises(SkdError, match=said):
            action()
        assert store.requests.total() == 1
    assert store.seen[NAME] == [b"old"]


@pytest.mark.usefixtures("serial")
def test_no_request_goes_on_beyond_its_deadline(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: Path
) -> None:
    monkeypatch.setenv("SKD_STORAGE_DEADLINE", "0.1")
    store.fault = lambda _kind, count: 429 if count % 2 else "lost"
    for action in (
        lambda: storage.upload(file, URI),
        lambda: storage.download(URI, tmp_path / "copy"),
        lambda: storage.read_bytes(URI),
        lambda: storage.list_objects(URI),
        lambda: storage.file_sizes(FOLDER),
        lambda: storage.exists(URI),
        lambda: streamed(URI),
        lambda: storage.delete(URI),
        lambda: storage.create_object(URI, b"mine"),
        lambda: storage.delete_object(URI, "2"),
        lambda: storage.check_writable(FOLDER),
    ):
        started = time.monotonic()
        with pytest.raises(SkdError, match="Google Cloud Storage failed"):
            action()
        assert 0.05 < time.monotonic() - started < 3
    assert store.seen == {NAME: [b"old"]}
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


@pytest.mark.parametrize("fault", ["lost", "cut", "corrupt"])
def test_a_download_that_fails_for_good_leaves_what_was_there(
    fault: Fault, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gcs, "_PAUSES", (0.001, 0.01))
    monkeypatch.setenv("SKD_STORAGE_DEADLINE", "0.2")
    before = written(version("old"), tmp_path / "place" / "model")
    (tmp_path / "place" / "file").write_bytes(b"old")
    for name, content in version("new").items():
        store.put(f"model/{name}", content)
    # Cut at half each time, a file ends in its last byte: nothing comes of that one.
    store.fault = lambda kind, count: (fault if fault != "cut" or count % 2 else "lost") if kind == "media" else None
    for uri, to in ((FOLDER, "model"), (f"{FOLDER}/large.safetensors", "file")):
        with pytest.raises(SkdError):
            storage.download(uri, tmp_path / "place" / to)
    assert tree(before) == version("old")
    assert (tmp_path / "place" / "file").read_bytes() == b"old"
    assert sorted(path.name for path in (tmp_path / "place").iterdir()) == ["file", "model"]


@pytest.mark.parametrize("kind", ["chunk", "rewrite", "delete"])
def test_a_server_that_keeps_silent_is_asked_again(
    kind: str, store: Store, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it was asked first it does in the end, when the second request has long been answered."""
    late = threading.Event()

    def hang(asked: str) -> None:
        if asked == kind and store.requests[kind] == 1:
            late.wait(10)

    monkeypatch.setattr(gcs, "_TIMEOUT", (5.0, 0.3))
    store.before = hang
    storage.upload(file, URI)
    assert store.seen[NAME] == [b"old", NEW]
    late.set()
    time.sleep(0.1)
    assert store.seen[NAME] == [b"old", NEW]
    assert left_behind(store) == []


@pytest.mark.parametrize("fault", [404, 410, "part kept"])
def test_a_session_that_the_server_has_lost_begins_anew(fault: Fault, store: Store, file: Path) -> None:
    store.fault = lambda kind, count: fault if kind == "chunk" and count == 2 else None
    storage.upload(file, URI)
    assert store.seen[NAME] == [b"old", NEW]
    assert left_behind(store) == []
    store.fault = always("chunk", fault)
    with pytest.raises(SkdError):
        storage.upload(file, URI)
    assert store.seen[NAME] == [b"old", NEW]
    assert left_behind(store) == []


def test_after_an_interruption_only_the_rest_is_transferred(store: Store, file: Path, tmp_path: Path) -> None:
    store.fault = lambda kind, count: "lost" if kind == "chunk" and count == 2 else None
    storage.upload(file, URI)
    assert store.received["chunk"] == len(NEW) + CHUNK
    store.fault = first("media", "cut", times=3)
    assert storage.download(URI, tmp_path / "copy").read_bytes() == NEW
    assert store.requests["media"] == 4
    assert store.sent < len(NEW) + 3 * 8192  # what the client had not yet unpacked of a block comes again


def test_the_files_of_a_folder_are_transferred_several_at_a_time(store: Store, tmp_path: Path) -> None:
    """Each waits for seven others to be on their way, too."""
    folder = tmp_path / "shards"
    folder.mkdir()
    for number in range(8):
        (folder / f"{number}.safetensors").write_bytes(b"x")
    together = threading.Barrier(8)
    store.before = lambda kind: None if kind not in {"multipart", "rewrite", "media"} else together.wait(10) and None
    storage.upload(folder, "gs://bucket/shards")
    assert tree(storage.download("gs://bucket/shards", tmp_path / "copy")) == tree(folder)
    assert not together.broken


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
    store.fault = nothing_goes_wrong
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


@pytest.mark.parametrize("calls", [1, 3])
@pytest.mark.parametrize("before", [b"", b"old"])
def test_of_two_writers_one_wins_and_the_other_is_told(
    before: bytes, calls: int, server: Server, tmp_path: Path
) -> None:
    store, together = server.store, threading.Barrier(2)
    if before:
        store.put(NAME, before)
    store.rewrite_calls = calls
    # Both have begun before one ends: the first two rewrites wait for each other.
    store.before = lambda kind: (
        together.wait(10) and None if kind == "rewrite" and store.requests["rewrite"] <= 2 else None
    )
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
    assert store.seen[NAME] == [*([before] if before else []), winner.read_bytes()]
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


@pytest.mark.parametrize("theirs", [b"somebody else's", None])
def test_what_another_does_between_two_calls_of_a_rewrite_stays(theirs: bytes | None, store: Store, file: Path) -> None:
    def fault(kind: str, count: int) -> Fault:
        if kind == "rewrite" and count == 2:
            store.put(NAME, theirs) if theirs else store.objects.pop(NAME)
        return None

    store.rewrite_calls = 2
    store.fault = fault
    with pytest.raises(SkdError, match=r"somebody else (wrote|deleted) this object in the meantime") as caught:
        storage.upload(file, URI)
    assert ("wrote" in caught.value.what) == (theirs is not None)
    assert store.content(NAME) == theirs
    assert left_behind(store) == []


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
    with pytest.raises(SkdError, match="somebody else wrote this object") as caught:
        storage.upload(written(version("new"), tmp_path / "model"), FOLDER, last=MARKER)
    assert caught.value.where == f"{FOLDER}/{MARKER}"
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
        with pytest.raises(storage.Missing, match="replaced or deleted while it was read"):
            read()
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


def test_a_small_object_that_is_corrupted_on_the_way_is_sent_again(store: Store) -> None:
    store.fault = first("multipart", "corrupt")
    assert storage.create_object("gs://bucket/claim", b"mine")
    assert store.seen["claim"] == [b"mine"]
    store.fault = always("multipart", "corrupt")
    with pytest.raises(SkdError, match="corrupted: 3 times in a row"):
        storage.create_object("gs://bucket/other", b"mine")
    assert "other" not in store.seen


@pytest.mark.slow
def test_a_store_that_is_gone_for_a_minute(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle of a folder's upload and of another's download, with the patience that is the default."""
    monkeypatch.delenv("SKD_STORAGE_DEADLINE")
    store, old, outage = server.store, version("old"), 60.0
    new = {**version("new"), **{f"model-{number}.safetensors": NEW[number:] for number in range(6)}}
    for name, content in old.items():
        store.put(f"model/{name}", content)
    for number in range(12):
        store.put(f"data/{number}.jsonl", NEW[number:])
    folder = written(new, tmp_path / "model")
    halfway = {"chunk": (15, threading.Event()), "media": (6, threading.Event())}
    back, during, returned = threading.Event(), [], []

    def fault(kind: str, count: int) -> Fault:
        if back.is_set() or kind not in halfway or count < halfway[kind][0]:
            return None
        halfway[kind][1].set()
        return "lost"

    def interrupt() -> None:
        for _, reached in halfway.values():
            reached.wait(30)
        server.stop()
        time.sleep(outage)
        during.append((left_behind(store), kept(store)))
        back.set()
        server.start()
        returned.append(time.monotonic())

    store.fault = fault
    threading.Thread(target=interrupt).start()
    with ThreadPoolExecutor(2) as pool:
        upload = pool.submit(storage.upload, folder, FOLDER, last=MARKER)
        download = pool.submit(storage.download, "gs://bucket/data", tmp_path / "data")
        upload.result()
        download.result()
    ended = time.monotonic()
    assert 0 < ended - returned[0] < gcs._PAUSES[1] + 10
    # It did happen in the middle: some files had arrived, some had not, none had changed.
    ((arrived, seen),) = during
    assert 0 < len(arrived) < len(new)
    assert seen == old
    assert tree(tmp_path / "data") == {f"{number}.jsonl": NEW[number:] for number in range(12)}
    # Nothing is lost, nothing is there twice, nothing appeared twice.
    assert stored(store) == new
    assert store.objects.keys() == {f"model/{name}" for name in new} | {f"data/{number}.jsonl" for number in range(12)}
    assert {name: store.seen[f"model/{name}"] for name in new} == {
        name: [*([old[name]] if name in old else []), content] for name, content in new.items()
    }


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


def test_a_writer_that_is_killed_between_two_files_leaves_a_folder_without_its_marker(
    server: Server, tmp_path: Path
) -> None:
    store, old, new = server.store, version("old"), version("new")
    for name, content in old.items():
        store.put(f"model/{name}", content)
    folder = written(new, tmp_path / "model")
    store.fault = lambda kind, count: "lost" if kind == "rewrite" and count > 1 else None
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


def test_the_progress_of_a_folder_is_that_of_all_its_files(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(transfers, "PROGRESS_FROM", 100_000)
    monkeypatch.setenv("SKD_EVENTS", "1")
    folder = written({f"{number}.bin": NEW[: 5000 * number] for number in range(12)}, tmp_path / "folder")
    total = sum(file.stat().st_size for file in folder.iterdir())
    storage.upload(folder, FOLDER)
    store.fault = first("media", "corrupt", times=3)  # what is fetched again does not count twice
    storage.download(FOLDER, tmp_path / "copy")
    events = [json.loads(line.removeprefix("::skd ")) for line in capsys.readouterr().out.splitlines()]
    for what in ("uploading folder", "fetching copy"):
        told = [event["done"] for event in events if event["what"] == what]
        assert told[-1] == max(told) == total
        assert len(told) >= 12
        if what.startswith("uploading"):
            assert told == sorted(told)


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
