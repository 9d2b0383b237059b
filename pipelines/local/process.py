"""Run one step as a child process: its output goes to a log, its events to the display, and it ends with the runner."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeAlias

from skd_lib._core import events
from skd_lib._core.processes import ends_with_parent
from skd_lib._core.uris import redactor
from skd_lib.errors import SkdError

LOGGED_PROGRESS_SECONDS = 10.0
STOP_SECONDS = 600.0
"""Time for a step to save its work after the first signal; a second signal ends it at once."""
KILL_SECONDS = 10.0
TAIL_LINES = 15


@dataclass(frozen=True)
class Outcome:
    """The end of a child process; a negative code is the number of the signal that ended it."""

    code: int
    error: str
    tail: tuple[str, ...]

    def explain(self) -> str:
        """Return why it failed, as a sentence."""
        if self.error:
            return self.error
        if self.code < 0:
            name = signal.Signals(-self.code).name
            advice = ": the machine may have run out of memory" if name == "SIGKILL" else ""
            return f"the process was ended by {name}{advice}"
        return "\n".join([f"the process ended with exit code {self.code}; its last lines:", *self.tail])


class StepFailed(SkdError):
    """A step of a local run failed."""

    def __init__(self, step: str, message: str, log: Path, code: int = 1) -> None:
        super().__init__(message, where=f"step {step}", hint=f"its whole output is in {log}")
        self.step = step
        self.log = log
        self.code = code


OnEvent: TypeAlias = Callable[[dict[str, Any]], None]
Start: TypeAlias = Callable[[str, list[str], Mapping[str, str], Path, OnEvent], Outcome]
"""Runs a step to its end: image, command, environment, log, and the handler of its events."""


def run_logged(command: Sequence[str], *, log: Path, env: Mapping[str, str], on_event: OnEvent) -> Outcome:
    """Run a command to its end.

    Its output goes to `log`, its event lines (`events`) to `on_event`. If the caller is interrupted, the child and its
    own children are stopped before the interruption goes on, and at once after a second interruption. If the caller is
    killed, the kernel kills the child (on Linux; elsewhere it ends when it next writes to its closed output).
    """
    child = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
        errors="replace",
        env=dict(env),
        start_new_session=True,  # Ctrl-C reaches us alone, and we stop the whole group
        preexec_fn=ends_with_parent(signal.SIGKILL),
    )
    assert child.stdout is not None  # noqa: S101 - it is piped
    try:
        error, tail = follow(child.stdout, log, on_event)
        outcome = Outcome(child.wait(), error, tail)
    except BaseException:
        # A child whose output is not read any more blocks when the pipe is full, and does not end.
        reader = threading.Thread(target=_read_on, args=(child.stdout, log), daemon=True)
        reader.start()
        _stop(child)
        reader.join(KILL_SECONDS)
        raise
    child.stdout.close()
    return outcome


def follow(lines: Iterable[str], log: Path, on_event: OnEvent) -> tuple[str, tuple[str, ...]]:
    """Send a step's text to `log` and its events to `on_event`; return its own error sentence and last lines."""
    tail: deque[str] = deque(maxlen=TAIL_LINES)
    error = ""
    logged = 0.0
    with log.open("ab", buffering=0) as file:
        for line in map(redactor(), lines):
            event = events.parse(line)
            if event is None:
                _write(file, line, log)
                if line.strip():
                    tail.append(line.rstrip())
                continue
            if event["event"] == "error":
                error = str(event["message"])
            elif event["event"] == "progress" and (
                time.monotonic() - logged >= LOGGED_PROGRESS_SECONDS or event["done"] >= event["total"]
            ):
                logged = time.monotonic()
                _write(file, f"{event['what']} {progress_text(event)}\n", log)
            on_event(event)
    return error, tuple(tail)


def progress_text(event: Mapping[str, Any]) -> str:
    """Return a progress event as text: `40/80 loss=1.2 rejection_rate=0.31`."""
    figures = " ".join(f"{name}={value:.4g}" for name, value in event.get("figures", {}).items())
    return f"{event['done']}/{event['total']} {figures}".rstrip()


def _write(file: IO[bytes], text: str, path: Path) -> None:
    """Write a text whole, or raise an error that names the file."""
    content = text.encode()
    try:
        written = file.write(content)
    except OSError as error:
        raise OSError(error.errno, os.strerror(error.errno or 0), str(path)) from error
    if written < len(content):  # the disk took a part, the next byte would not fit
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def _read_on(lines: IO[str], log: Path) -> None:
    """Copy the output of a child to the log while it is stopped."""
    with contextlib.suppress(OSError, ValueError), log.open("ab", buffering=0) as file:
        for line in map(redactor(), lines):
            if events.parse(line) is None:
                with contextlib.suppress(OSError):
                    file.write(line.encode())


def _stop(child: subprocess.Popen[str]) -> None:
    """End the child's process group: by SIGTERM, and by SIGKILL after `STOP_SECONDS` or another interruption."""
    try:
        _signal_group(child, signal.SIGTERM)
        child.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        pass
    finally:
        _signal_group(child, signal.SIGKILL)  # the step, or processes that it left running
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(KILL_SECONDS)


def _signal_group(child: subprocess.Popen[str], number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, number)
