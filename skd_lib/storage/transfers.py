"""Transfers: several at once, their deadline and their progress."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import IO, Any

from skd_lib._core.events import Progress
from skd_lib.errors import SkdError

DEADLINE_VARIABLE = "SKD_STORAGE_DEADLINE"
"""Seconds for which a request to object storage that fails is tried again."""
_DEADLINE = 600.0
WORKERS = 8
"""Transfers that run at the same time."""
PROGRESS_FROM = 64 * 2**20
"""Bytes from which on a transfer reports its progress."""


def deadline() -> float:
    """Return the seconds for which a failing request is tried again."""
    text = os.environ.get(DEADLINE_VARIABLE) or str(_DEADLINE)
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 < seconds < float("inf"):
        raise SkdError("not a number of seconds", where=f"{DEADLINE_VARIABLE}={text}", hint="e.g. 600")
    return seconds


def in_parallel(jobs: Sequence[Callable[[], None]]) -> None:
    """Run all jobs, several at once; after the first that fails those that have not begun are left out.

    Raises:
        Exception: what the first job that failed raised.
    """
    if not jobs:
        return
    with ThreadPoolExecutor(min(WORKERS, len(jobs)), thread_name_prefix="skd-storage") as pool:
        futures = [pool.submit(job) for job in jobs]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
    for future in futures:
        if not future.cancelled():
            future.result()


class Meter:
    """The progress of all transfers of one call, e.g. "uploading model", which have `total` bytes."""

    def __init__(self, what: str, total: int) -> None:
        self._progress = Progress(what, total) if total >= PROGRESS_FROM else None
        self._positions: dict[str, int] = {}
        self._lock = threading.Lock()

    def watch(self, file: IO[bytes], which: str) -> Any:
        """Return the file with its position counted at each read and write; `which` names it among the call's files."""
        return _Watched(file, which, self)

    def at(self, which: str, position: int) -> None:
        """Note that file `which` is at `position`."""
        with self._lock:
            self._positions[which] = position
            if self._progress is not None:
                self._progress.update(sum(self._positions.values()))


class _Watched:
    def __init__(self, file: IO[bytes], which: str, meter: Meter) -> None:
        self._file, self._which, self._meter = file, which, meter

    def read(self, size: int = -1) -> bytes:
        content = self._file.read(size)
        self._meter.at(self._which, self._file.tell())
        return content

    def write(self, content: bytes) -> int:
        written = self._file.write(content)
        self._meter.at(self._which, self._file.tell())
        return written

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)
