"""Text on its way to a person: what data, models and servers bring along cannot steer a terminal or a page.

In a page, escaping is the template's work. What is left are characters that no markup needs to be harmful: those that
turn the direction of the text around them (CVE-2021-42574), that are invisible, or that no encoding has.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import rich.console
from rich.segment import Segment
from rich.text import Text
from typing_extensions import override

from skd_lib._core.bugs import explained
from skd_lib._core.uris import redacted_output

if TYPE_CHECKING:
    from rich.console import ConsoleOptions, RenderableType

_SURROGATES = re.compile("[\ud800-\udfff]")
# Control characters but tab and newline; bidirectional controls; invisible ones, except the joiners that scripts and
# emoji are written with (U+200C, U+200D); line and paragraph separators; tags.
_INVISIBLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\U000e0000-\U000e007f]"
)


def visible(text: str) -> str:
    """Return the text with harmful characters shown instead of obeyed: `␛` for escape, `⟨U+202E⟩` for an override."""
    return _INVISIBLE.sub(_symbol, _SURROGATES.sub("\ufffd", text))


def clipped(text: str, length: int) -> str:
    """Return the text's beginning, and the number of characters that were left out."""
    return text if len(text) <= length else f"{text[:length]}… (+{len(text) - length:,} characters)"


def _symbol(match: re.Match[str]) -> str:
    code = ord(match[0])
    if code < 0x20:
        return chr(0x2400 + code)
    return "\u2421" if code == 0x7F else f"⟨U+{code:04X}⟩"


def say(text: str, *, err: bool = False) -> None:
    """Print lines with control characters shown instead of obeyed."""
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
        except Exception as error:  # noqa: BLE001 - unexpected errors end as a sentence too
            reason = explained(error)
            say(f"error: {reason}", err=True)
            sys.exit(reason.exit_code)


class VisibleFormatter(logging.Formatter):
    """Formatter of log records with control characters shown."""

    @override
    def format(self, record: logging.LogRecord) -> str:
        return visible(super().format(record))


class Console(rich.console.Console):
    """Rich's console for tables and progress bars, with control characters in texts shown instead of obeyed."""

    @override
    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(visible(text), **options)  # before its width is measured

    @override
    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for text, style, control in super().render(renderable, options):
            yield Segment(text if control else visible(text), style, control)

    @override
    def on_broken_pipe(self) -> None:
        """End quietly, as other programs do whose reader has gone, `head` for example."""
        # Rich's own looks at `sys.stdout`, which KFP replaces; so nothing is flushed into the pipe at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())
        raise SystemExit(1)


LINES_EVERY = 15.0
"""Seconds between two lines of progress in a log."""


@contextmanager
def progress_bar(what: str, at_first: str = "") -> Iterator[Callable[[int, int], None]]:
    """Show progress on standard error: a bar at a terminal, a line now and then in a log.

    Args:
        what: What is being done, e.g. "decoding".
        at_first: What is done before the first units.

    Yields:
        What to call with the units done and the units in all.
    """
    from rich.progress import Progress

    console, last = Console(stderr=True), time.monotonic()

    def line(done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last >= LINES_EVERY:
            last = time.monotonic()
            say(f"{what} {done}/{total}", err=True)

    if not console.is_terminal or console.is_dumb_terminal:
        say(f"{at_first or what} ...", err=True)
        yield line
        return
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task(at_first or what, total=None)
        yield lambda done, total: progress.update(task, description=what, completed=done, total=total)
