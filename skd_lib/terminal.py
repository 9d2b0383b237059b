"""Text on its way to a person: what data, models and servers bring along cannot steer the terminal."""

from __future__ import annotations

import logging
import sys

import typer
from typing_extensions import override

from skd_lib.report.untrusted import visible


def say(text: str, *, err: bool = False) -> None:
    """Print a line, or several, with control characters shown instead of obeyed."""
    typer.echo(visible(text), err=err)


def survive_any_encoding() -> None:
    """Write characters that standard output or errors cannot encode as escapes, instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        if reconfigure := getattr(stream, "reconfigure", None):
            reconfigure(errors="backslashreplace")


class VisibleFormatter(logging.Formatter):
    """Formats log records as `logging.Formatter` does, with control characters shown."""

    @override
    def format(self, record: logging.LogRecord) -> str:
        return visible(super().format(record))
