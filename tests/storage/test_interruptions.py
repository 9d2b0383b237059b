"""Storage that fails for a while, at any request: the work is done in the end, or a writer is told, and soon."""

from __future__ import annotations

import itertools
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from skd_lib import storage
from skd_lib.errors import SkdError
from skd_lib.storage import gcs
from tests.support.storage_server import Fault, Server, Store

from .faults import (
    CHUNK,
    FOLDER,
    MARKER,
    NAME,
    NEW,
    URI,
    always,
    first,
    keep,
    kept,
    nth,
    stored,
    streamed,
    tree,
    version,
    written,
)


@pytest.mark.usefixtures("serial")
@pytest.mark.parametrize("fault", ["lost", "answer lost"])
def test_an_upload_survives_an_interruption_at_every_request(fault: Fault, server: Server, tmp_path: Path) -> None:
    """Each request of a folder's upload in turn: files sent whole and in pieces, a marker."""
    store, old, new = server.store, version("old"), version("new")
    folder = written(new, tmp_path / "model")
    met: set[str] = set()
    for number in itertools.count(1):
        keep(store, old)
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
    assert met == {"list", "multipart", "start", "chunk", "delete"}


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
    kinds = {"stat", "start", "chunk", "multipart", "list", "media", "delete"}
    assert {kind for kind, count in store.requests.items() if count > len(statuses)} == kinds
    assert store.seen[NAME] == [b"old", NEW]


@pytest.mark.parametrize(("status", "said"), [(403, "access denied"), (400, "failed")])
def test_what_asking_again_cannot_help_fails_at_once(status: int, said: str, store: Store, file: Path) -> None:
    store.fault = lambda _kind, _count: status
    for action in (lambda: storage.upload(file, URI), lambda: storage.list_objects(URI)):
        store.requests.clear()
        with pytest.raises(SkdError, match=said) as caught:
            action()
        assert caught.value.exit_code == SkdError.exit_code
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
        store.requests.clear()
        with pytest.raises(SkdError, match="Google Cloud Storage failed"):
            action()
        assert store.requests.total() > 1
    assert store.seen == {NAME: [b"old"]}
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


@pytest.mark.parametrize("kind", ["start", "chunk"])
def test_a_server_that_keeps_silent_is_asked_again(
    kind: str, store: Store, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it was asked first it does in the end, when the second request has long been answered."""
    late = threading.Event()

    def hang(asked: str) -> None:
        if asked == kind and store.requests[kind] == 1:
            late.wait(10)

    monkeypatch.setattr(gcs, "TIMEOUT_SECONDS", (5.0, 0.3))
    store.before = hang
    storage.upload(file, URI)
    assert store.seen[NAME] == [b"old", NEW]
    late.set()
    time.sleep(0.1)
    assert store.seen[NAME] == [b"old", NEW]


@pytest.mark.parametrize("fault", [404, 410, "part kept"])
def test_a_session_that_the_server_has_lost_begins_again(fault: Fault, store: Store, file: Path) -> None:
    store.fault = lambda kind, count: fault if kind == "chunk" and count == 2 else None
    storage.upload(file, URI)
    assert store.seen[NAME] == [b"old", NEW]
    store.fault = always("chunk", fault)
    with pytest.raises(SkdError):
        storage.upload(file, URI)
    assert store.seen[NAME] == [b"old", NEW]


def test_after_an_interruption_only_the_rest_is_transferred(store: Store, file: Path, tmp_path: Path) -> None:
    store.fault = lambda kind, count: "lost" if kind == "chunk" and count == 2 else None
    storage.upload(file, URI)
    assert store.received["chunk"] == len(NEW) + CHUNK
    store.fault = first("media", "cut", times=3)
    assert storage.download(URI, tmp_path / "copy").read_bytes() == NEW
    assert store.requests["media"] == 4
    assert store.sent < len(NEW) + 3 * 8192  # what the client had not yet unpacked of a block comes again


@pytest.mark.parametrize("fault", ["lost", "cut", 503])
def test_a_download_survives_an_interruption(fault: Fault, store: Store, tmp_path: Path) -> None:
    store.put(NAME, NEW)
    store.fault = first("media", fault, times=2)
    assert storage.download(URI, tmp_path / "copy").read_bytes() == NEW
    assert store.requests["media"] == 3
    assert storage.read_bytes(URI) == NEW


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
    back, during = threading.Event(), []

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
        during.append(kept(store))
        back.set()
        server.start()

    store.fault = fault
    threading.Thread(target=interrupt).start()
    with ThreadPoolExecutor(2) as pool:
        upload = pool.submit(storage.upload, folder, FOLDER, last=MARKER)
        download = pool.submit(storage.download, "gs://bucket/data", tmp_path / "data")
        upload.result()
        download.result()
    # It did happen in the middle: some files had arrived, some had not, and the marker was not there.
    (seen,) = during
    assert 0 < sum(seen.get(name) == content for name, content in new.items()) < len(new)
    assert MARKER not in seen
    assert tree(tmp_path / "data") == {f"{number}.jsonl": NEW[number:] for number in range(12)}
    # Nothing is lost, nothing is there twice, nothing appeared twice.
    assert stored(store) == new
    assert store.objects.keys() == {f"model/{name}" for name in new} | {f"data/{number}.jsonl" for number in range(12)}
    assert {name: store.seen[f"model/{name}"] for name in new} == {
        name: [*([old[name]] if name in old else []), content] for name, content in new.items()
    }
