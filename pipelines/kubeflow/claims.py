"""Hold a claim: of several processes that want to start the run of one name, one does so at a time.

Kubeflow Pipelines cannot create a run only if there is none, so that looking and creating are kept together by a claim.
"""

from __future__ import annotations

import logging
import math
import os
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

VALID_SECONDS = 900.0
"""Age at which a claim is taken from a holder that died: far longer than the longest answer of a server."""
WAIT_SECONDS = 60.0
POLL_SECONDS = 0.2
_STARTING = "starting "

log = logging.getLogger(__name__)


class Busy(SkdError):
    """Another process holds the claim."""


@dataclass
class Claim:
    """The right of one process to start the run of a name.

    Others may take it over from `expires` on, by this process's monotonic clock; `run_id` is the run that was started;
    with `kept` it is left to expire, since the run may still be starting.
    """

    expires: float
    run_id: str = ""
    kept: bool = False


@contextmanager
def claim(folder: str, name: str, wait: float | None = None, valid: float = VALID_SECONDS) -> Iterator[Claim]:
    """Hold the claim `name` during the block; of several processes one holds it at a time.

    A claim is a small file or object that a process replaces only in the generation that it has read. It holds a token
    while a run is being started, and the run's id afterwards.

    `folder` is local or a gs:// URI; empty: a lock of this machine, which remembers no run. Raises Busy where another
    process holds the claim for `wait` seconds; after `valid` seconds a claim is taken over.
    """
    wait = WAIT_SECONDS if wait is None else wait
    hint = f"try again; the claim of a process that died ends after {VALID_SECONDS / 60:.0f} minutes"
    busy = Busy("another process is at work on it", where=name, hint=hint)
    if not folder:
        lock = FileLock(Path(tempfile.gettempdir()) / f"skd-{os.getuid()}-{name}.lock", timeout=wait)
        try:
            lock.acquire()
        except Timeout as error:
            raise busy from error
        try:
            yield Claim(math.inf)
        finally:
            lock.release()
        return
    if not storage.is_remote(folder):
        storage.check_writable(folder)
    uri, token, before = claim_uri(folder, name), f"{_STARTING}{uuid.uuid4().hex}", ""
    start = end = time.monotonic() + wait
    while True:
        generation, content, modified = _read(uri)
        if content == token:  # the answer to our request was lost
            break
        if not content.startswith(_STARTING) or time.time() - modified > valid:
            # From before the request: the claim's age counts from when it arrives, which is later.
            start, before = time.monotonic(), content
            taken = _replace(uri, generation, token)
            if taken is not None:
                generation = taken
                break
        if time.monotonic() > end:
            raise busy
        time.sleep(POLL_SECONDS * (1 + random.random()))  # noqa: S311 - spreads the waiting processes
    held = Claim(start + valid, _run_of(before))
    try:
        yield held
    finally:
        if not held.kept:
            try:
                _replace(uri, generation, held.run_id)
            except SkdError as error:  # the run has started, or the block's own error goes on
                log.warning("the claim %s is not given back, it expires by itself: %s", uri, error.brief)


def claim_uri(folder: str, name: str) -> str:
    """Return the file or object that is the claim of a name."""
    return f"{folder.rstrip('/')}/{name}"


def remembered(folder: str, name: str) -> str:
    """Return the id of the run that the claim remembers; empty where there is none."""
    if not folder:
        return ""
    return _run_of(_read(claim_uri(folder, name))[1])


def _run_of(content: str) -> str:
    return "" if content.startswith(_STARTING) else content


def _read(uri: str) -> tuple[str, str, float]:
    """Return a claim's generation, content and time of writing; of a missing claim two empty texts and 0."""
    try:
        stored, content = storage.list_objects(uri)[0], storage.read_bytes(uri).decode()
    except storage.Missing:
        return "", "", 0.0
    return stored.generation if storage.is_remote(uri) else content, content, stored.modified


def _replace(uri: str, generation: str, content: str) -> str | None:
    """Write a claim if it still has this generation, and return the new one; None if it has another."""
    if storage.is_remote(uri):
        return storage.create_object(uri, content.encode(), replacing=generation or "0")
    with FileLock(f"{uri}.lock"):
        if _read(uri)[0] != generation:
            return None
        storage.write_text_atomic(Path(uri), content)
    return content
