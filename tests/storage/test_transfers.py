"""How folders travel: several files at a time, with progress, within a deadline."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest

from skd_lib import storage
from skd_lib.errors import SkdError
from skd_lib.storage import transfers
from tests.support.storage_server import Store

from .faults import FOLDER, NEW, URI, first, tree, written


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
