"""A store that can be made to fail."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from skd_lib.storage import gcs, transfers
from tests.support.storage_server import Server, Store

from .faults import CHUNK, NAME, NEW


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A store, with small chunks and little patience."""
    server = Server()
    server.start()
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.address)
    monkeypatch.setenv("SKD_STORAGE_DEADLINE", "10")
    monkeypatch.setattr("google.cloud.storage.blob._MAX_MULTIPART_SIZE", CHUNK)
    monkeypatch.setattr(gcs, "CHUNK_BYTES", CHUNK)
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


@pytest.fixture
def serial(monkeypatch: pytest.MonkeyPatch) -> None:
    """One request after the other, so that each run asks the same, and hardly a pause."""
    monkeypatch.setattr(transfers, "WORKERS", 1)
    monkeypatch.setattr(gcs, "PAUSE_SECONDS", (0.001, 0.01))
