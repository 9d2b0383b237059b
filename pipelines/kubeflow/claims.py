"""Claims: of several processes that want to do the same thing, one does it at a time.

Kubeflow Pipelines cannot create a run only if there is none, so that looking and creating are kept together by a claim:
a lock file in a folder, which the kernel releases when its holder dies, or an object in Google Cloud Storage, which
only one writer can create (`ifGenerationMatch=0`) and which others take over when it is `VALID_SECONDS` old.

The same folder remembers runs that were started and that MLflow was not told of, for when Kubeflow has forgotten them.
"""

from __future__ import annotations

import math
import random
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from skd_lib import storage
from skd_lib.errors import SkdError

# Far longer than the longest answer of a server that is still waited for.
VALID_SECONDS = 900.0
WAIT_SECONDS = 60.0
POLL_SECONDS = 0.2


class Busy(SkdError):
    """Somebody else has the claim, and keeps it."""


@dataclass
class Claim:
    """A claim that is held.

    Attributes:
        expires: When others may take it over, on this process's monotonic clock.
        kept: It is not given back but left to expire: what was begun may not be over yet.
    """

    expires: float
    kept: bool = False


@contextmanager
def claim(folder: str, name: str, wait: float = WAIT_SECONDS, valid: float = VALID_SECONDS) -> Iterator[Claim]:
    """Hold the claim `name` during the block.

    Args:
        folder: Where claims are kept, a local folder or a gs:// URI, by all who compete.
        name: What is claimed.
        wait: Seconds to wait for another holder.
        valid: Seconds after which a claim in object storage is taken from a holder that died.

    Raises:
        Busy: another has it all that time.
        SkdError: the claims cannot be read or written.
    """
    busy = Busy("another process is at work on it", where=name, hint="try again")
    if not storage.is_remote(folder):
        storage.check_writable(folder)
        lock = FileLock(Path(folder) / f"{name}.lock", timeout=wait)
        try:
            lock.acquire()
        except Timeout as error:
            raise busy from error
        kept = Path(folder) / f"{name}.kept"
        try:
            if kept.exists() and time.time() - kept.stat().st_mtime < valid:
                raise busy
            held = Claim(math.inf)
            try:
                yield held
            finally:
                if held.kept:
                    kept.touch()
                else:
                    kept.unlink(missing_ok=True)
        finally:
            lock.release()
        return
    uri, token = f"{folder.rstrip('/')}/{name}", uuid.uuid4().hex.encode()
    end = time.monotonic() + wait
    while True:
        # From before the request: the claim's age counts from when it arrives, which is later.
        start = time.monotonic()
        generation = _take(uri, token, valid)
        if generation is not None:
            break
        if time.monotonic() > end:
            raise busy
        time.sleep(POLL_SECONDS * (1 + random.random()))  # noqa: S311 - spreads those who wait
    held = Claim(start + valid)
    try:
        yield held
    finally:
        if not held.kept:
            storage.delete_object(uri, generation)


def remember(folder: str, name: str, run_id: str) -> None:
    """Write down that a run was started for what is claimed as `name`.

    Raises:
        SkdError: the claims cannot be written.
    """
    with tempfile.NamedTemporaryFile() as empty:
        storage.upload(Path(empty.name), f"{_started(folder, name)}/{run_id}")


def forget(folder: str, name: str, run_id: str) -> None:
    """Take back what `remember` has written.

    Raises:
        SkdError: the claims cannot be written.
    """
    storage.delete(f"{_started(folder, name)}/{run_id}")


def remembered(folder: str, name: str) -> list[str]:
    """Return the URIs of what `remember` has written; the last part of each is a run's id.

    Raises:
        SkdError: the claims cannot be read.
    """
    try:
        return [stored.uri for stored in storage.list_objects(_started(folder, name))]
    except storage.Missing:
        return []


def _started(folder: str, name: str) -> str:
    return f"{folder.rstrip('/')}/{name}.started"


def _take(uri: str, token: bytes, valid: float) -> str | None:
    """The generation of our claim; None if another has it, or had it a moment ago."""
    generation = storage.create_object(uri, token)
    if generation is not None:
        return generation
    try:
        held, content = storage.list_objects(uri)[0], storage.read_bytes(uri)
    except storage.Missing:
        return None  # released in between
    if content == token:  # ours: the answer to the first request was lost, and it was repeated
        return held.generation
    if time.time() - held.modified > valid:
        return storage.create_object(uri, token, replacing=held.generation)
    return None
