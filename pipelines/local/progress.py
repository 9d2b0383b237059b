"""Show the progress of a pipeline: live bars at a terminal, plain lines in a log."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from typing_extensions import override

from skd_kfp.pipelines.local.process import progress_text

PLAIN_SECONDS = 15.0


class Display(ABC):
    """The display of a run's progress: a context manager around the run."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    @abstractmethod
    def started(self, step: str) -> None:
        """Show that a step starts."""

    @abstractmethod
    def progress(self, step: str, event: Mapping[str, Any]) -> None:
        """Show a step's progress event (`skd_lib._core.events`)."""

    @abstractmethod
    def finished(self, step: str, seconds: float, *, reused: bool) -> None:
        """Show that a step has finished, or that its outputs were reused."""

    @abstractmethod
    def failed(self, step: str, seconds: float) -> None:
        """Show that a step has failed."""

    @abstractmethod
    def note(self, text: str) -> None:
        """Show a remark; the run goes on."""


def display_for(console: Console, title: str, total: int) -> Display:
    """Return bars for a terminal, lines for a file."""
    return LiveDisplay(console, title, total) if console.is_terminal else PlainDisplay(console, total)


def duration(seconds: float) -> str:
    """Return seconds as text: `0.4 s`, `12 s`, `3 min 05 s`, `2 h 07 min`."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def _doing(step: str, event: Mapping[str, Any]) -> str:
    """Return the step's name, with its current activity if that has another name."""
    return step if event["what"] == step else f"{step}: {event['what']}"


class PlainDisplay(Display):
    """One line a step's start and end, and one every `PLAIN_SECONDS` in between."""

    def __init__(self, console: Console, total: int) -> None:
        self.console, self.total, self.done = console, total, 0
        self._shown = 0.0

    @override
    def started(self, step: str) -> None:
        self._shown = time.monotonic()
        self._say(f"[{self.done + 1}/{self.total}] {step} ...")

    @override
    def progress(self, step: str, event: Mapping[str, Any]) -> None:
        if time.monotonic() - self._shown >= PLAIN_SECONDS:
            self._shown = time.monotonic()
            self._say(f"[{self.done + 1}/{self.total}] {_doing(step, event)} {progress_text(event)}")

    @override
    def finished(self, step: str, seconds: float, *, reused: bool) -> None:
        self.done += 1
        how = f"unchanged, reused (took {duration(seconds)})" if reused else f"done in {duration(seconds)}"
        self._say(f"[{self.done}/{self.total}] {step}: {how}")

    @override
    def failed(self, step: str, seconds: float) -> None:
        self._say(f"[{self.done + 1}/{self.total}] {step}: FAILED after {duration(seconds)}")

    @override
    def note(self, text: str) -> None:
        self._say(f"note: {text}")

    def _say(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)


class LiveDisplay(Display):
    """A bar for the whole run, a bar for the step that runs, and a line above them for each that has finished."""

    def __init__(self, console: Console, title: str, total: int) -> None:
        self.console = console
        self._bars = Progress(
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
        self._whole = self._bars.add_task(f"[bold]{escape(title)}[/]", total=total, figures="")
        self._current: TaskID | None = None

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    @override
    def started(self, step: str) -> None:
        self._current = self._bars.add_task(step, total=None, figures="")

    @override
    def progress(self, step: str, event: Mapping[str, Any]) -> None:
        if self._current is not None:
            figures = "  ".join(f"{name} {value:.4g}" for name, value in event.get("figures", {}).items())
            self._bars.update(
                self._current,
                description=_doing(step, event),
                completed=event["done"],
                total=event["total"],
                figures=figures,
            )

    @override
    def finished(self, step: str, seconds: float, *, reused: bool) -> None:
        self._remove_current()
        self._bars.advance(self._whole)
        mark, note = ("[cyan]=[/]", "  [dim]reused[/]") if reused else ("[green]✓[/]", "")
        self._bars.console.print(f"{mark} {step:<28} {duration(seconds):>12}{note}", highlight=False)

    @override
    def failed(self, step: str, seconds: float) -> None:
        self._remove_current()
        self._bars.console.print(f"[red]✗[/] {step:<28} {duration(seconds):>12}", highlight=False)

    @override
    def note(self, text: str) -> None:
        self._bars.console.print(f"note: {text}", markup=False, highlight=False, soft_wrap=True)

    def _remove_current(self) -> None:
        if self._current is not None:
            self._bars.remove_task(self._current)
            self._current = None
