"""Attempts at the same work, which may run at the same time; each writes to a folder of its own.

A retry can start while the pod before it is still dying, or is cut off from the network, and two runs can have the same
settings. So an attempt only reads other attempts' folders, and deletes those that are useless and whose owners have
ended. A running attempt rewrites a small file at intervals, its sign of life.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
import threading
import time
import uuid
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType

from skd_lib import storage
from skd_lib.errors import SkdError

ALIVE = "alive"
"""Name of the sign of life in an attempt's folder."""
_SILENT = 180.0
"""Seconds without a sign of life after which an attempt on another machine counts as ended."""
_open: set[str] = set()
"""The signs of life that this process gives."""
log = logging.getLogger(__name__)


def new_attempt() -> str:
    """Name a new attempt; names sort by time."""
    return f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{uuid.uuid4().hex[:8]}"


class Heartbeat:
    """Gives signs of life in an attempt's folders (local ones or URIs), every `interval` seconds from entry to exit.

    An error deletes the signs at exit. Otherwise they stay, since the trained weights are still to be saved: the
    attempt ends with its process (for another machine: some minutes later).
    """

    def __init__(self, folders: Sequence[str], interval: float = 30.0) -> None:
        self._signs, self._interval = [f"{folder}/{ALIVE}" for folder in folders], interval
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._go_on, name="skd-heartbeat", daemon=True)

    def __enter__(self) -> None:
        """Give the first sign of life."""
        self._beat()
        _open.update(self._signs)
        self._thread.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop; after an error delete the signs of life."""
        self._ended.set()
        self._thread.join(5)
        _open.difference_update(self._signs)
        for sign in self._signs if kind else []:
            try:
                storage.delete(sign)
            except SkdError as trouble:
                log.warning("%s stays for now: %s", sign, trouble)

    def _beat(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / ALIVE
            pid = os.getpid()
            file.write_text(json.dumps({"machine": _machine(), "pid": pid, "started": _started(pid)}), encoding="utf-8")
            for sign in self._signs:
                storage.upload(file, sign)

    def _go_on(self) -> None:
        failing = False
        while not self._ended.wait(self._interval):
            try:
                self._beat()
                failing = False
            except (SkdError, OSError) as error:
                if not failing:
                    log.warning("the sign that this training is running could not be written: %s", error)
                failing = True


def living(place: str, attempts: Iterable[str], *, own: str) -> set[str]:
    """Return the names of the running ones of `attempts`, whose folders are in `place`.

    The sign of life of `own`, the caller's attempt, gives the time of that file system.
    """
    attempts = list(attempts)
    if not attempts:
        return set()
    now = _modified(f"{place}/{own}/{ALIVE}") or time.time()
    return {attempt for attempt in attempts if _lives(f"{place}/{attempt}/{ALIVE}", now)}


def _lives(sign: str, now: float) -> bool:
    modified = _modified(sign)
    if modified is None:
        return False
    try:
        owner = json.loads(storage.read_bytes(sign))
        if owner["machine"] and owner["machine"] == _machine():
            if owner["pid"] == os.getpid():
                return sign in _open
            return bool(_started(int(owner["pid"])) == owner["started"])
    except (storage.Missing, ValueError, KeyError, TypeError):
        pass  # deleted meanwhile, or damaged: its age decides
    return now - modified < _SILENT


def _modified(uri: str) -> float | None:
    try:
        (found,) = storage.list_objects(uri)
    except storage.Missing:
        return None
    return found.modified


def _machine() -> str:
    """Identify the machine and its namespace of process numbers; empty where the system does not say (macOS)."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""


def _started(pid: int) -> str:
    """Return the start of a process, in the kernel's ticks; empty if there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]
