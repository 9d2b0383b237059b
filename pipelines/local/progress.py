"""Show the progress of a pipeline: live bars at a terminal, plain lines in a log."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from typing_extensions import override

from skd_kfp.pipelines.local.process import progress_text
from skd_lib._core.format import duration

PLAIN_SECONDS = 15.0


def display_for(console: Console, title: str, total: int) -> Display:
    """Return bars for a terminal, lines for a file."""
    return LiveDisplay(console, title, total) if console.is_terminal else Display(console, total)


class Display:
    """Shows a run by one line at a step's start and end, and one every `PLAIN_SECONDS` in between.

    A context manager around the run.
    """

    def __init__(self, console: Console, total: int) -> None:
        self.console, self.total, self.done = console, total, 0
        self._shown = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def started(self, step: str) -> None:
        """Show that a step starts."""
        self._shown = time.monotonic()
        self._say(f"[{self.done + 1}/{self.total}] {step} ...")

    def progress(self, step: str, event: Mapping[str, Any]) -> None:
        """Show a step's progress event (`skd_lib._core.events`)."""
        if time.monotonic() - self._shown >= PLAIN_SECONDS:
            self._shown = time.monotonic()
            self._say(f"[{self.done + 1}/{self.total}] {_activity(step, event)} {progress_text(event)}")

    def finished(self, step: str, seconds: float, *, reused: bool) -> None:
        """Show that a step has finished, or that its outputs were reused."""
        self.done += 1
        how = f"unchanged, reused (took {duration(seconds)})" if reused else f"done in {duration(seconds)}"
        self._say(f"[{self.done}/{self.total}] {step}: {how}")

    def failed(self, step: str, seconds: float) -> None:
        """Show that a step has failed."""
        self._say(f"[{self.done + 1}/{self.total}] {step}: FAILED after {duration(seconds)}")

    def note(self, text: str) -> None:
        """Show a remark; the run goes on."""
        self._say(f"note: {text}")

    def _say(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)


class LiveDisplay(Display):
    """Shows a bar for the run, a bar for the running step, and above them a line for each finished step."""

    def __init__(self, console: Console, title: str, total: int) -> None:
        super().__init__(console, total)
        self.bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[figures]}", style="dim"),
            console=console,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._whole = self.bars.add_task(f"[bold]{escape(title)}[/]", total=total, figures="")
        self._current: TaskID | None = None

    def __enter__(self) -> Self:
        self.bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bars.stop()

    @override
    def started(self, step: str) -> None:
        self._current = self.bars.add_task(step, total=None, figures="")

    @override
    def progress(self, step: str, event: Mapping[str, Any]) -> None:
        if self._current is not None:
            figures = "  ".join(f"{name} {value:.4g}" for name, value in event.get("figures", {}).items())
            doing, done, total = _activity(step, event), event["done"], event["total"]
            self.bars.update(self._current, description=doing, completed=done, total=total, figures=figures)

    @override
    def finished(self, step: str, seconds: float, *, reused: bool) -> None:
        self._remove_current()
        self.bars.advance(self._whole)
        mark, remark = ("[cyan]=[/]", "  [dim]reused[/]") if reused else ("[green]✓[/]", "")
        self.console.print(f"{mark} {step:<28} {duration(seconds):>12}{remark}", highlight=False)

    @override
    def failed(self, step: str, seconds: float) -> None:
        self._remove_current()
        self.console.print(f"[red]✗[/] {step:<28} {duration(seconds):>12}", highlight=False)

    def _remove_current(self) -> None:
        if self._current is not None:
            self.bars.remove_task(self._current)
            self._current = None


def _activity(step: str, event: Mapping[str, Any]) -> str:
    """Return the step's name, with its current activity if that has another name."""
    return step if event["what"] == step else f"{step}: {event['what']}"
