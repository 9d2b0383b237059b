"""What a server has answered, kept as it comes: work that was killed goes on without asking again."""

from __future__ import annotations

import json
import logging
import shutil
import time
import uuid
from pathlib import Path
from typing import Any

from skd_lib import storage

SECONDS_BETWEEN_UPLOADS = 60.0
log = logging.getLogger(__name__)


class Answers:
    """Values by key, in files that are only appended to, one for each process and attempt.

    Args:
        folder: A local folder.
        remote: A URI to which full files go once a minute; empty: the local folder outlives the process.
        rank: Each process has a subfolder of its own.
    """

    def __init__(self, folder: Path, remote: str = "", rank: int = 0) -> None:
        self._whole = (folder, remote)
        folder, remote = folder / str(rank), remote and f"{remote}/{rank}"
        self._folder, self._remote = folder, remote
        if remote and not folder.exists() and storage.exists(remote):
            storage.download(remote, folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._places: dict[str, tuple[Path, int]] = {}
        for path in sorted(folder.glob("*.jsonl")):
            start = 0
            for line in path.read_bytes().splitlines(keepends=True):
                # The last one may be cut off; of one that a machine's end left as zeros nothing is known.
                if line.endswith(b"\n") and line.startswith(b"["):
                    self._places[json.loads(line)[0]] = (path, start)
                start += len(line)
        if self._places:
            log.info("%d answers of the teacher are kept from before, and not asked for again", len(self._places))
        self._begin()

    def get(self, key: str) -> Any:
        """Return the value of a key; None if there is none."""
        if key not in self._places:
            return None
        path, start = self._places[key]
        with path.open("rb") as file:
            file.seek(start)
            return json.loads(file.readline())[1]

    def add(self, key: str, value: Any) -> None:
        """Keep a value."""
        self._places[key] = (self._path, self._file.tell())
        self._file.write(json.dumps([key, value], separators=(",", ":")).encode() + b"\n")
        self._file.flush()
        if self._remote and time.monotonic() - self._begun > SECONDS_BETWEEN_UPLOADS:
            self.upload()
            self._begin()

    def upload(self) -> None:
        """Close the present file, and copy it to the remote folder if there is one."""
        self._file.close()
        if self._remote and self._path.stat().st_size:
            storage.upload(self._path, f"{self._remote}/{self._path.name}")

    def remove(self) -> None:
        """Remove all values of all processes, here and remotely."""
        self._file.close()
        folder, remote = self._whole
        shutil.rmtree(folder, ignore_errors=True)
        if remote:
            storage.delete(remote)

    def _begin(self) -> None:
        self._path = self._folder / f"{uuid.uuid4().hex}.jsonl"
        self._file = self._path.open("ab")
        self._begun = time.monotonic()
