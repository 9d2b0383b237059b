"""Transfers that fail for good or are corrupted on the way: an object is the old one or the new one."""

from __future__ import annotations

from pathlib import Path

import pytest

from skd_lib import storage
from skd_lib.errors import SkdError, Transient
from skd_lib.storage import gcs
from tests.support.storage_server import Fault, Store

from .faults import FOLDER, MARKER, NAME, NEW, URI, always, first, stored, tree, version, written


@pytest.mark.parametrize("fault", ["lost", "cut", "corrupt"])
def test_a_download_that_fails_for_good_leaves_what_was_there(
    fault: Fault, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gcs, "PAUSE_SECONDS", (0.001, 0.01))
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


@pytest.mark.parametrize("kind", ["stat", "start", "chunk"])
def test_an_upload_that_fails_for_good_leaves_the_old_object(
    kind: str, store: Store, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SKD_STORAGE_DEADLINE", "0.5")
    store.fault = always(kind, 503)
    with pytest.raises(Transient, match="Google Cloud Storage failed") as caught:
        storage.upload(file, URI)
    assert "SKD_STORAGE_DEADLINE (now 0.5 seconds)" in caught.value.hint
    assert store.seen[NAME] == [b"old"]
    assert file.read_bytes() == NEW


def test_what_an_older_version_left_unfinished_is_in_no_listing_and_deleted_with_its_folder(store: Store) -> None:
    store.put(f"{NAME}.1a2b.skd-upload", NEW)
    assert storage.file_sizes("gs://bucket/models") == {"student.safetensors": 3}
    assert [item.uri for item in storage.list_objects("gs://bucket/models")] == [URI]
    storage.delete("gs://bucket/models")
    assert store.objects == {}


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


def test_a_corrupted_object_that_the_server_takes_is_replaced(store: Store, file: Path) -> None:
    store.checks_hashes = False
    store.fault = first("chunk", "corrupt")
    storage.upload(file, URI)
    assert store.content(NAME) == NEW
    store.fault = always("chunk", "corrupt")
    with pytest.raises(SkdError, match="corrupted: 3 times in a row"):
        storage.upload(file, URI)
    assert NAME not in store.objects


def test_a_corrupted_download_is_fetched_again(store: Store, tmp_path: Path) -> None:
    store.put(NAME, NEW)
    store.fault = first("media", "corrupt")
    assert storage.download(URI, tmp_path / "copy").read_bytes() == NEW
    store.fault = always("media", "corrupt")
    for action in (lambda: storage.download(URI, tmp_path / "other"), lambda: storage.read_bytes(URI)):
        with pytest.raises(Transient, match="the transfer was corrupted") as caught:
            action()
        assert caught.value.where == URI
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy"]


def test_a_small_object_that_is_corrupted_on_the_way_is_sent_again(store: Store) -> None:
    store.fault = first("multipart", "corrupt")
    assert storage.create_object("gs://bucket/claim", b"mine")
    assert store.seen["claim"] == [b"mine"]
    store.fault = always("multipart", "corrupt")
    with pytest.raises(SkdError, match="corrupted: 3 times in a row"):
        storage.create_object("gs://bucket/other", b"mine")
    assert "other" not in store.seen


def test_a_folder_of_which_not_all_has_arrived_has_no_marker(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SKD_STORAGE_DEADLINE", "0.5")
    for name, content in version("old").items():
        store.put(f"model/{name}", content)
    store.fault = always("chunk", 503)
    with pytest.raises(SkdError, match="Google Cloud Storage failed"):
        storage.upload(written(version("new"), tmp_path / "model"), FOLDER, last=MARKER)
    assert stored(store).keys() == version("new").keys() - {MARKER}
    assert store.objects["model/large.safetensors"][0] == version("old")["large.safetensors"]
