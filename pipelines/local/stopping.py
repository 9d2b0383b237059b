"""Stop a run on this machine: by Ctrl-C, and by the SIGTERM and SIGHUP of schedulers and terminals."""

from __future__ import annotations

import os
import shlex
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

import typer

from skd_kfp.pipelines.local.process import StepFailed
from skd_lib._core.terminal import say
from skd_lib._core.uris import redacted, shown
from skd_lib.errors import Preempted

INTERRUPTED = 130
_STOPPED = (Preempted.exit_code, -signal.SIGTERM, 128 + signal.SIGTERM)
"""Exit codes of a step that got SIGTERM, or failed for what may pass by itself."""
_SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
_received: list[int] = []


class Stopped(KeyboardInterrupt):
    """A signal asks for the run's end."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


def check() -> None:
    """Raise `Stopped` if a signal has come whose exception was lost, as Python drops one in a destructor."""
    if _received:
        raise Stopped(_received[0])


@contextmanager
def stoppable() -> Iterator[None]:
    """Raise `Stopped` in the block when a signal comes, and again when another comes during the cleanup.

    Ctrl-C and SIGHUP are left ignored where the shell has them ignored, as for a job in the background or `nohup`.
    Python delivers signals to the main thread alone: in other threads this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    taken = [
        number for number in _SIGNALS if number == signal.SIGTERM or signal.getsignal(number) is not signal.SIG_IGN
    ]
    before = {number: signal.signal(number, _stop) for number in taken}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _received.clear()


def same_command() -> str:
    """Return this process's command line for a shell, without passwords and without `--fresh`."""
    return shlex.join(["skd", *(redacted(shown(word)) for word in sys.argv[1:] if word != "--fresh")])


@contextmanager
def explain_end(command: str) -> Iterator[None]:
    """Print why a run stopped before its end, and what to do.

    Exits with 1 after a failed step; 75 (`EX_TEMPFAIL`, "try again later") after SIGTERM or SIGHUP, to this process or
    to its step, and where a step failed for what may pass by itself; 130 after Ctrl-C. `command` runs it again.
    """
    try:
        with stoppable():
            yield
    except StepFailed as failure:
        say(f"\nerror: {failure}", err=True)
        if failure.code in _STOPPED:
            say(f"Finished steps and checkpoints are kept: `{command}` goes on from there.", err=True)
            raise typer.Exit(Preempted.exit_code) from failure
        say(f"Finished steps are kept: correct the cause and run `{command}` again to go on.", err=True)
        raise typer.Exit(1) from failure
    except KeyboardInterrupt as interruption:
        by = f"stopped by {interruption}" if isinstance(interruption, Stopped) else "interrupted"
        say(f"\n{by}. Finished steps and checkpoints are kept: `{command}` goes on from there.", err=True)
        asked_to_wait = isinstance(interruption, Stopped) and interruption.number != signal.SIGINT
        raise typer.Exit(Preempted.exit_code if asked_to_wait else INTERRUPTED) from interruption


def _stop(number: int, _frame: FrameType | None) -> None:
    if not _received:
        message = f"\n{signal.Signals(number).name}: the running step is stopped, training saves a checkpoint first; a "
        with suppress(OSError):  # the terminal is gone
            os.write(2, f"{message}second signal ends it at once\n".encode())
    _received.append(number)
    raise Stopped(number)
