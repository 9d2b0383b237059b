"""Events of a running step.

A person at a terminal sees log lines. A runner that starts the step sets `SKD_EVENTS=1` and gets one line an event
instead, `::skd {json}`, which it turns into progress bars and a short error message.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from typing import Any

ENV = "SKD_EVENTS"
PREFIX = "::skd "
log = logging.getLogger(__name__)


def emit(kind: str, **fields: Any) -> None:
    """Write one event line to standard output, if a runner is watching."""
    if os.environ.get(ENV):
        print(PREFIX + json.dumps({"event": kind, **fields}), file=sys.stdout, flush=True)


def note(message: str) -> None:
    """Tell a person of a problem although the step goes on; it is logged as a warning, too."""
    log.warning("%s", message)
    emit("note", message=message)


def outcome(message: str) -> None:
    """Tell the result of the run, for the last lines that a person reads; it is printed, too."""
    print(message)
    emit("outcome", message=message)


def parse(line: str) -> dict[str, Any] | None:
    """Return the event in a line of a step's output, or None for ordinary output."""
    if not line.startswith(PREFIX):
        return None
    try:
        event = json.loads(line[len(PREFIX) :])
    except json.JSONDecodeError:
        return None
    return event if isinstance(event, dict) else None


class Progress:
    """Progress of one long piece of work, e.g. "training", of `total` units.

    It is logged at most every `interval` seconds when no runner is watching.
    """

    def __init__(self, what: str, total: int = 0, *, interval: float = 10.0) -> None:
        self.what, self.total, self.interval = what, total, interval
        self._last = time.monotonic()

    def update(self, done: int, **figures: float) -> None:
        """Tell that `done` of `total` units are finished, with figures worth seeing (loss, rejection rate)."""
        emit("progress", what=self.what, done=done, total=self.total, figures=figures)
        now = time.monotonic()
        if not os.environ.get(ENV) and (now - self._last >= self.interval or done >= self.total):
            self._last = now
            shown = " ".join(f"{name}={value:.4g}" for name, value in figures.items())
            log.info("%s %d/%d %s", self.what, done, self.total, shown)

    def update_of(self, done: int, total: int) -> None:
        """Tell that `done` of `total` units are finished, where the total was not known before."""
        self.total = total
        self.update(done)
