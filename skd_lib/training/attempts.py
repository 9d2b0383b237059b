"""Attempts at the same work, which may run at the same time; each writes to a folder of its own.

A retry can start while the pod before it is still dying, or is cut off from the network, and two runs can have the same
settings. So an attempt only ever reads what others wrote. Their folders are deleted once they are of no more use and
their owners are gone. An attempt shows that it is running by a small file that it writes again and again.
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
"""The file by which an attempt shows that it is running, in its folder."""
_INTERVAL = 30.0
_SILENT = 180.0
"""Seconds between two signs of life, and without one after which an attempt on another machine counts as gone."""
_open: set[str] = set()
"""The signs of life that this very process gives."""
log = logging.getLogger(__name__)


def new_attempt() -> str:
    """Name a new attempt; names sort by time."""
    return f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{uuid.uuid4().hex[:8]}"


class Heartbeat:
    """Shows that an attempt is running, from entry to exit.

    After an exit by an error the signs of life are deleted. After a good one they stay: what was trained is still to
    be saved, and the end of the process (seen from another machine: some minutes) decides.

    Args:
        folders: The attempt's folders, local ones or URIs.
    """

    def __init__(self, folders: Sequence[str]) -> None:
        self._signs = [f"{folder}/{ALIVE}" for folder in folders]
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._go_on, name="skd-heartbeat", daemon=True)

    def __enter__(self) -> None:
        """Give the first sign of life.

        Raises:
            SkdError: a folder cannot be written.
        """
        self._beat()
        _open.update(self._signs)
        self._thread.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop."""
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
        told = False
        while not self._ended.wait(_INTERVAL):
            try:
                self._beat()
                told = False
            except (SkdError, OSError) as error:
                if not told:
                    log.warning("the sign that this training is running could not be written: %s", error)
                told = True


def living(place: str, attempts: Iterable[str], *, own: str) -> set[str]:
    """Return which of the attempts in a folder are running.

    Args:
        place: The folder with the attempts' folders.
        attempts: Their names.
        own: Name of the attempt that asks: its own sign of life tells the time there.

    Raises:
        SkdError: the folder cannot be read.
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
        pass  # it is gone by now, or damaged: its age tells
    return now - modified < _SILENT


def _modified(uri: str) -> float | None:
    try:
        (found,) = storage.list_objects(uri)
    except storage.Missing:
        return None
    return found.modified


def _machine() -> str:
    """Where process numbers mean what they mean here; empty where the system does not say (macOS)."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""


def _started(pid: int) -> str:
    """When a process began, in the kernel's ticks; empty if there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]
