"""The outbox of a step: records that the tracking store does not take wait in a file, in order, and are sent later.

A file begins with one line that says where its entries belong, followed by one line an entry. An entry whose answer got
lost is sent twice, which changes nothing.
"""

from __future__ import annotations

import errno
import logging
import math
import os
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from skd_lib import storage
from skd_lib._core import events
from skd_lib._core.uris import shown
from skd_lib.errors import SkdError
from skd_lib.tracking.client import Deleted, brief, store_name, unanswered, untaken
from skd_lib.tracking.entries import ENTRY, Entry, Sender
from skd_lib.tracking.locate import RunLocation

if TYPE_CHECKING:
    from mlflow.entities import Run

log = logging.getLogger(__name__)
SUFFIX = ".jsonl"
FOLDER_VARIABLE = "SKD_TRACKING_BUFFER"
"""Environment variable with the folder or URI for files whose store did not answer until the end of the step."""
RETRY_SECONDS = 60.0
SILENCE_FACTOR = 20
"""A store that lets a step wait is asked again after this many times as long: the work comes first."""


class OutboxFile:
    """Entries that wait, in order. The file is there only while some do; in memory there is never more than one.

    It is left in `FOLDER_VARIABLE`, else in `keep`, else among this machine's temporary files.
    """

    def __init__(self, location: RunLocation, keep: str = "") -> None:
        self._location = location
        wanted = left_in(keep)
        self._destination = wanted if storage.is_remote(wanted) else ""
        folder = _temporary_folder() if self._destination else Path(wanted)
        words = "-".join(part for part in (location.pipeline_run_id, location.step) if part)
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
            location = self._location.model_copy(update={"tracking_uri": shown(self._location.tracking_uri)})
            lines.insert(0, location.model_dump_json().encode())
            self._done = 0
        # Parameters may be confidential.
        with os.fdopen(os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "ab", buffering=0) as file:
            before = file.tell()
            content = b"".join(line + b"\n" for line in lines)
            if file.write(content) < len(content):
                file.truncate(before)  # a part of a line would spoil the next one
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._path))
        self.waiting += 1

    def take(self) -> Iterator[Entry]:
        """Yield the entries that wait, oldest first. Each counts as sent once the next one is asked for."""
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
        """Put the file where it outlives the step, and return that place: a local one if object storage fails."""
        if not self._destination:
            return str(self._path)
        uri = f"{self._destination.rstrip('/')}/{self._path.name}"
        try:
            storage.upload(self._path, uri)
        except SkdError as error:
            log.warning("%s", error.brief)
            return str(self._path)
        self._path.unlink()
        return uri


class Outbox:
    """A step's connection to the store.

    While the store does not answer, entries are kept in an `OutboxFile`; it is asked again every `RETRY_SECONDS`, and
    the entries that wait are sent first.
    """

    def __init__(self, location: RunLocation, keep: str = "") -> None:
        self.uri, self._location = location.tracking_uri, location
        self._sender: Sender | None = None
        self._file = OutboxFile(location, keep)
        self._silent_until = -math.inf
        self._lost = 0

    @property
    def runs(self) -> dict[str, Run]:
        """The runs `step` and `parent`; empty until the store has answered."""
        return {which: target.run for which, target in self._sender.targets.items()} if self._sender else {}

    def open(self) -> None:
        """Find or create the runs now rather than with the first entry."""
        if not self.uri:
            return
        start = time.monotonic()
        try:
            self._sender = Sender(self._location, running=True)
            self._sender.open()
        except untaken() as error:
            self._note(error, start)

    def log(self, entry: Entry) -> None:
        """Send an entry after those that wait, or keep it."""
        if self.uri and not self._send(entry):
            self._keep(entry)

    def insist(self) -> bool:
        """Find or create the runs and send all that waits, though the store was silent; tell whether it answered."""
        return bool(self.uri) and self._send(insist=True)

    def close(self, last: Entry) -> None:
        """Send the last entry, though the store was silent just now, or leave all that waits for `replay`."""
        if self.uri and not self._send(last, insist=True):
            self._keep(last)
            self._leave()
        if self._lost:
            log.warning("%d entries of step %s for MLflow could not be kept", self._lost, self._location.step)

    def put_off(self, entry: Entry, error: Exception) -> None:
        """Leave an entry that the store has just not taken for `replay`."""
        self._note(error, time.monotonic())
        self._keep(entry)
        self._leave()

    def _send(self, *entries: Entry, insist: bool = False) -> bool:
        start = time.monotonic()
        if start < self._silent_until and not insist:
            return False
        troubles: tuple[type[Exception], ...] = (SkdError, *unanswered())
        try:
            sender = self._sender = self._sender or Sender(self._location, running=True)
            sender.open()
            for entry in self._file.take():
                sender.send(entry)
            for entry in entries:
                sender.send(entry)
        except troubles as error:  # a step that has begun does not end for its records
            self._note(error, start)
            return False
        if self._silent_until > 0:
            log.info("MLflow at %s answers again", shown(self.uri))
            self._silent_until = -math.inf
        return True

    def _keep(self, entry: Entry) -> None:
        try:
            self._file.append(entry)
        except OSError as error:
            if not self._lost:
                log.warning("what MLflow does not take cannot be kept either, and is lost: %s", error)
            self._lost += 1

    def _note(self, error: Exception, since: float) -> None:
        """Report the store's silence once, and do not ask it for a while; it was asked at `since`."""
        uri = shown(self.uri)
        if self._silent_until < 0 and isinstance(error, Deleted):
            events.note(f"MLflow at {uri} takes nothing: {error.what}, so records wait on disk; {error.hint}")
        elif self._silent_until < 0:
            words = "MLflow at %s does not answer; the step goes on, and what it logs waits on disk: %s"
            log.warning(words, uri, brief(error))
        now = time.monotonic()
        self._silent_until = now + max(RETRY_SECONDS, SILENCE_FACTOR * (now - since))

    def _leave(self) -> None:
        if self._file.waiting:
            events.note(
                f"MLflow at {shown(self.uri)} did not answer to the end of step {self._location.step}; "
                f"{self._file.waiting} entries are kept: once it answers, run `skd track replay {self._file.leave()}`"
            )


def left_in(keep: str = "") -> str:
    """Return the folder or URI where a step leaves its file, see `OutboxFile`."""
    return os.environ.get(FOLDER_VARIABLE) or keep or str(_temporary_folder())


def waiting_files(folder: str) -> list[str]:
    """Return the paths or URIs of files that steps have left in a folder or in object storage, in no order.

    An empty file is left where the disk took nothing.
    """
    if storage.is_remote(folder):
        sizes = storage.file_sizes(folder)
        return [f"{folder.rstrip('/')}/{name}" for name, size in sizes.items() if name.endswith(SUFFIX) and size]
    return [str(path) for path in Path(folder).glob(f"*{SUFFIX}") if path.stat().st_size]


def read_location(path: Path) -> RunLocation:
    """Read the first line of an outbox file."""
    try:
        with path.open("rb") as file:
            return RunLocation.model_validate_json(file.readline())
    except (OSError, ValidationError) as error:
        raise _unreadable(path, error) from error


def _read_entries(path: Path) -> Iterator[Entry]:
    """Yield the entries of a file, in order; a last line that was cut off as the step was killed is left out."""
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
    what = f"cannot read what was kept for MLflow: {reason}"
    where = str(path) if isinstance(error, OSError) else f"{path}:{line}"
    return SkdError(what, where=where, hint="give a file that a step left behind")


def _temporary_folder() -> Path:
    return Path(tempfile.gettempdir()) / f"skd-tracking-{os.getuid()}"


def resend(folder: str, tracking_uri: str, pipeline_run_id: str = "") -> list[str]:
    """Send the files of one store and run that steps have left in a folder, oldest step first, and delete them.

    The first file that the store does not take ends it: what comes after it would be out of order. No step of the run
    (empty: of any run) may be writing there. Return the files that were not sent, though they were to be.
    """
    found: list[tuple[int, str, Path]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for number, file in enumerate(waiting_files(folder)):
            path = storage.download(file, Path(scratch) / str(number)) if storage.is_remote(file) else Path(file)
            try:
                location = read_location(path)
            except SkdError as error:
                log.warning("%s", error.brief)
                continue
            if location.tracking_uri == shown(tracking_uri) and pipeline_run_id in ("", location.pipeline_run_id):
                found.append((location.started, file, path))
        found.sort()
        for number, (_, file, path) in enumerate(found):
            try:
                sent, refused = replay(path, tracking_uri)
            except SkdError as error:
                log.warning("%s", error.brief)
                return [left for _, left, _ in found[number:]]
            storage.delete(file)
            log.info("%s: %d entries sent%s", file, sent, f", {refused} of them refused" if refused else "")
    return []


def replay(path: Path, tracking_uri: str | None = None) -> tuple[int, int]:
    """Send a file that a step left behind, in order; all of it may be sent again if this is interrupted.

    The tracking URI is given if the store has another address by now, or needs credentials in it. Return the numbers of
    entries that were sent, and of those that the store refused.
    """
    location = read_location(path)
    location = location.model_copy(update={"tracking_uri": tracking_uri}) if tracking_uri else location
    sent = 0
    try:
        sender = Sender(location, running=False)
        for entry in _read_entries(path):
            sender.send(entry)
            sent += 1
    except unanswered() as error:
        raise SkdError(
            f"MLflow stopped answering after {sent} entries: {brief(error)}",
            where=store_name(location.tracking_uri),
            hint=f"the file is unchanged: run `skd track replay {path}` again once it answers",
        ) from error
    return sent, sender.refused
