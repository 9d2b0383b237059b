"""The log of a job's first node in this process's output: each line once, through lost connections and pods."""

from __future__ import annotations

import logging
import math
import re
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, Self

import urllib3
from kubernetes.client.exceptions import ApiException

from skd_lib.errors import SkdError
from skd_lib.multinode.cluster import Cluster

log = logging.getLogger(__name__)
_INDEX = "batch.kubernetes.io/job-completion-index"
_STAMP = re.compile(r"([^.]*?)(?:\.(\d+))?(?:Z|[+-]\d\d:\d\d)")
_LAST_TRIES = 5
"""Attempts at the rest of a log, once the job has ended."""
_MARGIN = 60
"""Seconds before the last line from which a log is read again: its lines come with some delay."""


class Unseen:
    """Filter of the lines that were read before a connection was cut.

    Kubernetes puts a line's time before it, in nanoseconds. Lines come in that order, and several may share one.
    """

    def __init__(self) -> None:
        self._last, self._count, self._again = "", 0, 0

    def restart(self) -> None:
        """Expect the log from somewhere before its last line."""
        self._again = self._count

    def new(self, stamped: str) -> str | None:
        """Return the line without its time, or None if it was read before."""
        stamp, _, line = stamped.partition(" ")
        stamp = _sortable(stamp)
        if stamp < self._last:
            return None
        if stamp == self._last and self._again:
            self._again -= 1
            return None
        self._again = 0
        self._count = self._count + 1 if stamp == self._last else 1
        self._last = stamp
        return line


def _sortable(stamp: str) -> str:
    """Return a time in RFC 3339 without its zone, with all nine digits: so times of a node sort as texts."""
    found = _STAMP.fullmatch(stamp)
    whole, fraction = found.groups(default="") if found else (stamp, "")
    return f"{whole}.{fraction:0<9}"


def whole_lines(chunks: Iterable[bytes]) -> Iterator[str]:
    """Yield the lines of a stream. A last one without its end is given only if the stream ends properly."""
    rest = b""
    for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        yield from (line.decode(errors="replace") for line in lines)
    if rest:
        yield rest.decode(errors="replace")


@dataclass
class _Reading:
    """State of reading one pod's log: its filter, the time of the last line, and whether the end was reached."""

    unseen: Unseen = field(default_factory=Unseen)
    heard: float | None = None
    finished: bool = False


class LogFollower(threading.Thread):
    """A thread that writes each line of the first node's log within `with`; of a pod that replaces it, too."""

    def __init__(self, cluster: Cluster, job: str, write: Callable[[str], None], pause: float = 2.0) -> None:
        super().__init__(name="log", daemon=True)
        self._cluster, self._job, self._write, self._pause = cluster, job, write, pause
        self._ended = threading.Event()
        self._readings: defaultdict[str, _Reading] = defaultdict(_Reading)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, failed: type[BaseException] | None, *_: object) -> None:
        """Read the rest once the job has ended, and stop. After an error there may be no rest to wait for."""
        self._ended.set()
        self.join(1.0 if failed else 60.0)
        if self.is_alive() and not failed:
            log.warning("the rest of the log of %s does not come; `kubectl logs` has it", self._job)

    def run(self) -> None:
        """Follow the log until the job has ended and its log is read."""
        last_tries = _LAST_TRIES
        while last_tries:
            ended = self._ended.is_set()
            try:
                # Asked for each time: a pod that failed may have been replaced.
                unread = [pod for pod in self._cluster.pods(self._job) if self._is_unread(pod)]
                for pod in unread:
                    self._follow(
                        pod["metadata"]["name"], over=ended or pod["status"]["phase"] in ("Succeeded", "Failed")
                    )
            except SkdError as error:
                log.warning("the log is not followed any more: %s", error)
                return
            if ended:
                last_tries = last_tries - 1 if any(map(self._is_unread, unread)) else 0
            self._ended.wait(self._pause)

    def _is_unread(self, pod: Mapping[str, Any]) -> bool:
        first = pod["metadata"].get("labels", {}).get(_INDEX) == "0"
        started = pod.get("status", {}).get("phase", "Pending") != "Pending"
        return first and started and not self._readings[pod["metadata"]["name"]].finished

    def _follow(self, pod: str, *, over: bool) -> None:
        """Write the new lines of a pod's log, until the connection ends: the end of the log if the pod is `over`."""
        reading = self._readings[pod]
        since = None if reading.heard is None else math.ceil(time.monotonic() - reading.heard) + _MARGIN
        reading.unseen.restart()
        try:
            response = self._cluster.log(pod, since_seconds=since, follow=not over)
            try:
                for stamped in whole_lines(response.stream()):
                    reading.heard = time.monotonic()
                    if (line := reading.unseen.new(stamped)) is not None:
                        self._write(line)
                reading.finished = over
            finally:
                response.close()
        except ApiException as error:
            if error.status in (401, 403):
                raise SkdError(f"not allowed to read it: {error.reason}", where=f"log of pod {pod}") from error
            # Everything else corrects itself: the container has not started, the pod is gone, or the server is away.
            reading.finished = over and error.status == HTTPStatus.NOT_FOUND
        except urllib3.exceptions.HTTPError as error:
            log.debug("the log of %s was cut off: %s", pod, error)
