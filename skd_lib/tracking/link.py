"""The way from a step to the tracking store, which may be down: what it does not take waits on disk, in order."""

from __future__ import annotations

import logging
import math
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from skd_lib import storage
from skd_lib._core import events
from skd_lib._core.uris import shown
from skd_lib.errors import SkdError
from skd_lib.tracking.buffer import Buffer, read_entries, read_place, waiting_files
from skd_lib.tracking.client import Deleted, brief, check_not_deleted, connect, store_name, unanswered, untaken
from skd_lib.tracking.ending import PipelineClosing
from skd_lib.tracking.entries import REFUSALS, Entry, Target
from skd_lib.tracking.locate import ATTEMPT_TAG, Place, locate

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

log = logging.getLogger(__name__)
RETRY_SECONDS = 60.0
_SHARE = 20
"""A store that lets a step wait for its silence is asked again after so many times as long: the work comes first."""


class Sender:
    """Sends entries to the runs they belong to.

    Args:
        place: Where they belong.
        running: Whether the step is running: then its runs are marked so, and this attempt is the latest.
    """

    def __init__(self, place: Place, *, running: bool) -> None:
        self.place, self._running = place, running
        self.client: MlflowClient = connect(place.tracking_uri)
        self.targets: dict[str, Target] = {}
        self.refused = 0

    def open(self) -> None:
        """Find or make the runs."""
        if not self.targets:
            runs = locate(self.client, self.place, reopen=self._running)
            latest = int(runs["step"].data.tags.get(ATTEMPT_TAG, 0))
            superseded = not self._running and latest > self.place.started
            self.targets = {which: Target(run, superseded=superseded) for which, run in runs.items()}

    def send(self, entry: Entry) -> None:
        """Send one entry; one that the store refuses for what it says is left out, with a warning.

        Raises:
            Deleted: the experiment was deleted, but can be restored.
        """
        from mlflow.exceptions import MlflowException

        if isinstance(entry, PipelineClosing):
            entry.close(self.client, self.place)
            return
        self.open()
        target = self.targets[entry.which]
        try:
            entry.send(self.client, target)
        except MlflowException as error:
            if error.error_code not in REFUSALS:
                raise
            experiment = self.client.get_experiment(target.run.info.experiment_id)
            check_not_deleted(experiment, self.place.tracking_uri)
            self.refused += 1
            uri = shown(self.place.tracking_uri)
            log.warning("MLflow at %s refused a request, which is left out: %s", uri, brief(error))


class Link:
    """A step's connection to the store.

    While the store does not answer, entries are kept in a `Buffer`; it is asked again every `RETRY_SECONDS`, and what
    waits is sent first. An entry whose answer got lost is sent twice, which changes nothing.

    Args:
        place: Where entries belong.
        keep: See `Buffer`.
    """

    def __init__(self, place: Place, keep: str = "") -> None:
        self.uri = place.tracking_uri
        self._place = place
        self._sender: Sender | None = None
        self._buffer = Buffer(place, keep)
        self._silent_until = -math.inf
        self._lost = 0

    @property
    def runs(self) -> dict[str, Run]:
        """The runs `step` and `parent`; empty until the store has answered."""
        return {which: target.run for which, target in self._sender.targets.items()} if self._sender else {}

    def open(self) -> None:
        """Find or make the runs now rather than with the first entry.

        Raises:
            SkdError: the tracking URI can never work.
        """
        if not self.uri:
            return
        start = time.monotonic()
        try:
            self._sender = Sender(self._place, running=True)
            self._sender.open()
        except untaken() as error:
            self._note(error, start)

    def log(self, entry: Entry) -> None:
        """Send an entry after those that wait, or keep it."""
        if self.uri and not self._reach(lambda sender: self._catch_up(sender, entry)):
            self._keep(entry)

    def insist(self) -> bool:
        """Find or make the runs and send all that waits, though the store was silent just now; whether it answered."""

        def send(sender: Sender) -> None:
            sender.open()
            self._catch_up(sender)

        return bool(self.uri) and self._reach(send, insist=True)

    def close(self, last: Entry) -> None:
        """Send the last entry, though the store was silent just now, or leave all that waits for `replay`."""
        if self.uri and not self._reach(lambda sender: self._catch_up(sender, last), insist=True):
            self._keep(last)
            self._leave()
        if self._lost:
            log.warning("%d entries of step %s for MLflow could not be kept", self._lost, self._place.step)

    def put_off(self, entry: Entry, error: Exception) -> None:
        """Leave an entry that the store has just not taken for `replay`."""
        self._note(error, time.monotonic())
        self._keep(entry)
        self._leave()

    def _reach(self, action: Callable[[Sender], object], *, insist: bool = False) -> bool:
        start = time.monotonic()
        if start < self._silent_until and not insist:
            return False
        try:
            self._sender = self._sender or Sender(self._place, running=True)
            action(self._sender)
        except _trouble() as error:  # a step that has begun does not end for its records
            self._note(error, start)
            return False
        if self._silent_until > 0:
            log.info("MLflow at %s answers again", shown(self.uri))
            self._silent_until = -math.inf
        return True

    def _catch_up(self, sender: Sender, *more: Entry) -> None:
        for entry in self._buffer.take():
            sender.send(entry)
        for entry in more:
            sender.send(entry)

    def _keep(self, entry: Entry) -> None:
        try:
            self._buffer.append(entry)
        except OSError as error:
            if not self._lost:
                log.warning("what MLflow does not take cannot be kept either, and is lost: %s", error)
            self._lost += 1

    def _note(self, error: Exception, since: float) -> None:
        """Tell of the store's silence once, and let it be for a while; it was asked at `since`."""
        if self._silent_until < 0:
            uri = shown(self.uri)
            if isinstance(error, Deleted):
                events.note(f"MLflow at {uri} takes nothing: {error.what}, so records wait on disk; {error.hint}")
            else:
                log.warning(
                    "MLflow at %s does not answer; the step goes on, and what it logs waits on disk: %s",
                    uri,
                    brief(error),
                )
        now = time.monotonic()
        self._silent_until = now + max(RETRY_SECONDS, _SHARE * (now - since))

    def _leave(self) -> None:
        if not self._buffer.waiting:
            return
        try:
            place = self._buffer.leave()
        except SkdError as error:
            log.warning("%s", error.brief)
            place = error.where
        events.note(
            f"MLflow at {shown(self.uri)} did not answer to the end of step {self._place.step}; "
            f"{self._buffer.waiting} entries are kept: once it answers, run `skd track replay {place}`"
        )


def _trouble() -> tuple[type[Exception], ...]:
    return (SkdError, *unanswered())


def resend(folder: str, tracking_uri: str, pipeline_run_id: str = "") -> list[str]:
    """Send what steps have left in a folder, in the order in which they began, and delete the files.

    The first file that the store does not take ends it: what comes after it would be out of order.

    Args:
        folder: See `buffer.left_in`. No step may be writing there, unless `pipeline_run_id` leaves out its files.
        tracking_uri: The store; files of other stores stay.
        pipeline_run_id: Whose files are sent; empty: those of all runs.

    Returns:
        The files that were not sent, though they were to be.

    Raises:
        SkdError: object storage cannot be read.
    """
    found: list[tuple[int, str, Path]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for number, file in enumerate(waiting_files(folder)):
            path = storage.download(file, Path(scratch) / str(number)) if storage.is_remote(file) else Path(file)
            try:
                place = read_place(path)
            except SkdError as error:
                log.warning("%s", error.brief)
                continue
            if place.tracking_uri == shown(tracking_uri) and pipeline_run_id in ("", place.pipeline_run_id):
                found.append((place.started, file, path))
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
    """Send what a step left behind, in order; all of it may be sent again if this is interrupted.

    Args:
        path: The file.
        tracking_uri: The store, if it has another address by now or needs credentials in it.

    Returns:
        How many entries were sent, and how many of them the store refused.

    Raises:
        SkdError: the file cannot be read, or the store does not answer.
    """
    place = read_place(path)
    place = place.model_copy(update={"tracking_uri": tracking_uri}) if tracking_uri else place
    sent = 0
    try:
        sender = Sender(place, running=False)
        for entry in read_entries(path):
            sender.send(entry)
            sent += 1
    except unanswered() as error:
        raise SkdError(
            f"MLflow stopped answering after {sent} entries: {brief(error)}",
            where=store_name(place.tracking_uri),
            hint=f"the file is as it was: run `skd track replay {path}` again once it answers",
        ) from error
    return sent, sender.refused
