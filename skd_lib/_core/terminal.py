"""Text on its way to a person: what data, models and servers bring along cannot steer the terminal."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable

from typing_extensions import override

from skd_lib._core.bugs import explained
from skd_lib._core.untrusted import visible
from skd_lib._core.uris import redacted_output


def say(text: str, *, err: bool = False) -> None:
    """Print a line, or several, with control characters shown instead of obeyed."""
    print(visible(text), file=sys.stderr if err else sys.stdout, flush=True)


def survive_any_encoding() -> None:
    """Write characters that standard output or errors cannot encode as escapes, instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        if reconfigure := getattr(stream, "reconfigure", None):
            reconfigure(errors="backslashreplace")


def run_command(command: Callable[[], object]) -> None:
    """Run a command line; an error ends the process with a sentence and an exit code, not with a traceback."""
    survive_any_encoding()
    with redacted_output():
        try:
            command()
        except Exception as error:  # noqa: BLE001 - what nobody foresaw ends as a sentence too
            told = explained(error)
            say(f"error: {told}", err=True)
            sys.exit(told.exit_code)


class VisibleFormatter(logging.Formatter):
    """Formats log records as `logging.Formatter` does, with control characters shown."""

    @override
    def format(self, record: logging.LogRecord) -> str:
        return visible(super().format(record))
