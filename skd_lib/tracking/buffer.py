"""What a tracking store has not taken yet, in a file: one line that says where it belongs, then one line an entry."""

from __future__ import annotations

import errno
import os
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

from pydantic import ValidationError

from skd_lib import storage
from skd_lib._core.uris import shown
from skd_lib.errors import SkdError
from skd_lib.tracking.entries import ENTRY, Entry
from skd_lib.tracking.locate import Place

SUFFIX = ".jsonl"
FOLDER_VARIABLE = "SKD_TRACKING_BUFFER"
"""Folder or URI in object storage where files are left whose store did not answer to the end of the step."""


class Buffer:
    """Entries that wait, in order. The file is there only while some do; in memory there is never more than one.

    Args:
        place: Where they belong.
        keep: Where the file is left if `FOLDER_VARIABLE` is not set; empty: among this machine's temporary files.
    """

    def __init__(self, place: Place, keep: str = "") -> None:
        self._place = place
        wanted = left_in(keep)
        self._destination = wanted if storage.is_remote(wanted) else ""
        folder = _temporary_folder() if self._destination else Path(wanted)
        words = "-".join(part for part in (place.pipeline_run_id, place.step) if part)
        name = "".join(letter if letter.isalnum() or letter in "-_." else "_" for letter in words)
        self._path = folder / f"{name[:150]}-{uuid.uuid4().hex[:8]}{SUFFIX}"
        self._done = 0
        self.waiting = 0

    def append(self, entry: Entry) -> None:
        """Keep an entry.

        Raises:
            OSError: the folder is full or not writable.
        """
        lines = [entry.model_dump_json().encode()]
        if not self.waiting:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            place = self._place.model_copy(update={"tracking_uri": shown(self._place.tracking_uri)})
            lines.insert(0, place.model_dump_json().encode())
            self._done = 0
        # Parameters may be nobody else's business.
        with os.fdopen(os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "ab", buffering=0) as file:
            before = file.tell()
            content = b"".join(line + b"\n" for line in lines)
            if file.write(content) < len(content):
                file.truncate(before)  # a part of a line would spoil the next one
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._path))
        self.waiting += 1

    def take(self) -> Iterator[Entry]:
        """The entries that wait, oldest first. Each counts as sent once the next one is asked for."""
        if not self.waiting:
            return
        with self._path.open("rb") as file:
            file.seek(self._done)
            if not self._done:
                file.readline()
            while line := file.readline():
                yield ENTRY.validate_json(line)
                self._done = file.tell()
                self.waiting -= 1
        self._path.unlink()
        self.waiting = 0

    def leave(self) -> str:
        """Put the file where it outlives the step, and say where that is.

        Raises:
            SkdError: object storage does not take it; it is still at the local path named in the error.
        """
        if not self._destination:
            return str(self._path)
        uri = f"{self._destination.rstrip('/')}/{self._path.name}"
        try:
            storage.upload(self._path, uri)
        except SkdError as error:
            raise SkdError(error.what, where=str(self._path), hint=error.hint) from error
        self._path.unlink()
        return uri


def left_in(keep: str = "") -> str:
    """Folder or URI where a step leaves its file, see `Buffer`."""
    return os.environ.get(FOLDER_VARIABLE) or keep or str(_temporary_folder())


def waiting_files(folder: str) -> list[str]:
    """Paths or URIs of what steps have left in a folder, or in a place in object storage; in no order.

    An empty file is left where the disk took nothing.
    """
    if storage.is_remote(folder):
        sizes = storage.file_sizes(folder)
        return [f"{folder.rstrip('/')}/{name}" for name, size in sizes.items() if name.endswith(SUFFIX) and size]
    return [str(path) for path in Path(folder).glob(f"*{SUFFIX}") if path.stat().st_size]


def read_place(path: Path) -> Place:
    """The first line of a buffer's file.

    Raises:
        SkdError: the file is none.
    """
    try:
        with path.open("rb") as file:
            return Place.model_validate_json(file.readline())
    except (OSError, ValidationError) as error:
        raise _unreadable(path, error) from error


def read_entries(path: Path) -> Iterator[Entry]:
    """The entries of a buffer's file, in order; a last line that was cut off as the step was killed is left out.

    Raises:
        SkdError: a line is no entry.
    """
    with path.open("rb") as file:
        file.readline()
        for number, line in enumerate(file, start=2):
            if not line.endswith(b"\n"):
                return
            try:
                yield ENTRY.validate_json(line)
            except ValidationError as error:
                raise _unreadable(path, error, line=number) from error


def _unreadable(path: Path, error: Exception, line: int = 1) -> SkdError:
    reason = error.strerror if isinstance(error, OSError) else "it is not what a step leaves behind"
    return SkdError(
        f"cannot read what was kept for MLflow: {reason}",
        where=f"{path}:{line}",
        hint="give a file that a step left behind",
    )


def _temporary_folder() -> Path:
    return Path(tempfile.gettempdir()) / f"skd-tracking-{os.getuid()}"
