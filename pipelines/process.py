"""One step as a child process: its output goes to a log, its events to whoever watches, and it never outlives us."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol, TypeAlias

from skd_lib import events

PR_SET_PDEATHSIG = 1
LOGGED_PROGRESS_SECONDS = 10.0
STOP_SECONDS = 10.0
TAIL_LINES = 15


@dataclass(frozen=True)
class Outcome:
    """How a child process ended.

    Attributes:
        code: Exit code; negative is the number of the signal that ended it.
        error: The step's own error sentence, empty if it gave none.
        tail: The last lines of its output.
    """

    code: int
    error: str
    tail: tuple[str, ...]

    def explain(self) -> str:
        """Why it failed, in words for a person."""
        if self.error:
            return self.error
        if self.code < 0:
            name = signal.Signals(-self.code).name
            advice = ": the machine may have run out of memory" if name == "SIGKILL" else ""
            return f"the process was ended by {name}{advice}"
        return "\n".join([f"the process ended with exit code {self.code}; its last lines:", *self.tail])


OnEvent: TypeAlias = Callable[[dict[str, Any]], None]
"""Takes an event of a step, see `skd_lib.events`."""
Start: TypeAlias = Callable[[str, list[str], Mapping[str, str], Path, OnEvent], Outcome]
"""Runs a step to its end: image, command, environment, log, and who takes its events."""


class Child(Protocol):
    """A running step, the first of its process group."""

    @property
    def pid(self) -> int:
        """Its process id."""

    @property
    def stdout(self) -> IO[str] | None:
        """Its output and errors."""

    def wait(self, timeout: float | None = None) -> int:
        """Its exit code, negative for a signal; raises `subprocess.TimeoutExpired`."""


def run_logged(command: Sequence[str], *, log: Path, env: Mapping[str, str], on_event: OnEvent) -> Outcome:
    """Run a command to its end, see `watch`; if the caller is killed, the kernel kills it.

    (On Linux. Elsewhere it ends when it next writes to its closed output.)
    """
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
        errors="replace",
        env=dict(env),
        start_new_session=True,  # Ctrl-C reaches us alone, and we stop the whole group
        preexec_fn=die_with_parent(os.getpid()),
    ) as child:
        return watch(child, log=log, on_event=on_event)


def watch(child: Child, *, log: Path, on_event: OnEvent) -> Outcome:
    """Wait for a child's end.

    Its output goes to `log`, event lines (`skd_lib.events`) to `on_event`. If the caller is interrupted, the child and
    its children are stopped before the interruption goes on.
    """
    assert child.stdout is not None  # noqa: S101 - it is piped
    try:
        error, tail = follow(child.stdout, log, on_event)
        return Outcome(child.wait(), error, tail)
    except BaseException:
        _stop(child)
        raise


def follow(lines: Iterable[str], log: Path, on_event: OnEvent) -> tuple[str, tuple[str, ...]]:
    """Read what a step says until it is silent: its text goes to `log`, its events to `on_event`.

    Returns:
        The step's own error sentence (empty if it gave none), and the last lines of its text.
    """
    tail: deque[str] = deque(maxlen=TAIL_LINES)
    error = ""
    logged = 0.0
    with log.open("a", encoding="utf-8") as file:
        for line in lines:
            event = events.parse(line)
            if event is None:
                file.write(line)
                file.flush()
                if line.strip():
                    tail.append(line.rstrip())
                continue
            if event["event"] == "error":
                error = str(event["message"])
            elif event["event"] == "progress" and (
                time.monotonic() - logged >= LOGGED_PROGRESS_SECONDS or event["done"] >= event["total"]
            ):
                logged = time.monotonic()
                file.write(f"{event['what']} {progress_text(event)}\n")
                file.flush()
            on_event(event)
    return error, tuple(tail)


def progress_text(event: Mapping[str, Any]) -> str:
    """A progress event as text: `40/80 loss=1.2 rejection_rate=0.31`."""
    figures = " ".join(f"{name}={value:.4g}" for name, value in event.get("figures", {}).items())
    return f"{event['done']}/{event['total']} {figures}".rstrip()


def die_with_parent(parent: int) -> Callable[[], None] | None:
    """What the child does before it becomes the step: ask the kernel to be killed when its parent dies.

    The C library is loaded here, in the parent: between fork and exec as little as possible may happen.
    """
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None, use_errno=True).prctl

    def ask() -> None:
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before we asked
            os._exit(1)

    return ask


def _stop(child: Child) -> None:
    """End the child's process group: politely, then not."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, number)
        try:
            child.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            continue
        return
