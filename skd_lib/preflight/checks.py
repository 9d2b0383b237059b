"""What a check says, the report of all checks, and how they are collected."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, TypeVar

from skd_lib._core.bugs import explained
from skd_lib._core.terminal import visible
from skd_lib._core.uris import redacted
from skd_lib.config import RunConfig
from skd_lib.errors import SkdError, SkdErrors

if TYPE_CHECKING:
    from rich.table import Table

Level = Literal["ok", "warning", "error"]
T = TypeVar("T")
TRACKING = "tracking"
_SYMBOLS: dict[Level, str] = {"ok": "✓", "warning": "!", "error": "✗"}
_COLOURS: dict[Level, str] = {"ok": "green", "warning": "yellow", "error": "red"}


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        name: What was looked at.
        level: How it is.
        what: What was found.
        where: File, row, field or model; empty if there is none.
        hint: What to do about it; empty if nothing.
    """

    name: str
    level: Level
    what: str
    where: str = ""
    hint: str = ""


class Refused(SkdErrors):
    """Everything that keeps a run from starting, a line each: people read the last lines of a step's log."""

    def __str__(self) -> str:
        return "\n".join([f"{self.what}:", *(f"- {error.line}" for error in self.errors)])


@dataclass
class PreflightReport:
    """What `run_checks` found.

    Attributes:
        checks: One or more for each thing that was looked at, in order.
        data_fingerprint: Identifies the data's content and preparation; empty if the data cannot be read.
        date: What chat templates print instead of today's date; empty where none prints one.
        model_fingerprints: Identify each model's content, by its reference; without those that cannot be read.
    """

    checks: list[Check] = field(default_factory=list)
    data_fingerprint: str = ""
    date: str = ""
    model_fingerprints: dict[str, str] = field(default_factory=dict)

    @property
    def tracking_works(self) -> bool:
        """Whether the tracking store answered (or tracking is off)."""
        return not any(check.name == TRACKING and check.level == "error" for check in self.checks)

    def errors(self) -> list[SkdError]:
        """What must be mended before the run can start."""
        return [
            SkdError(check.what, where=check.where or check.name, hint=check.hint)
            for check in self.checks
            if check.level == "error"
        ]

    def raise_errors(self) -> None:
        """Raise what must be mended, if anything.

        Raises:
            Refused: all of it.
        """
        if errors := self.errors():
            raise Refused(errors)

    def table(self) -> Table:
        """The report for a terminal."""
        from rich.table import Table
        from rich.text import Text

        table = Table(title="Preflight", show_lines=False)
        for column in ("", "check", "found"):
            table.add_column(column)
        for check in self.checks:
            found = Text(visible(f"{check.where}: {check.what}" if check.where else check.what))
            if check.hint:
                found.append(visible(f"\nhint: {check.hint}"), style="dim")
            table.add_row(Text(_SYMBOLS[check.level], style=_COLOURS[check.level]), check.name, found)
        return table

    def markdown(self) -> str:
        """The report as a Markdown table."""
        lines = ["# Preflight", "", "| | check | found | what to do |", "|---|---|---|---|"]
        for check in self.checks:
            found = f"{check.where}: {check.what}" if check.where else check.what
            cells = (_SYMBOLS[check.level], check.name, found, check.hint)
            lines.append(f"| {' | '.join(_markdown_cell(visible(cell)) for cell in cells)} |")
        return "\n".join(lines) + "\n"


class Checks:
    """Collects what is found; an error in one check does not keep the others from being made."""

    def __init__(self) -> None:
        self.found: list[Check] = []

    def add(self, name: str, level: Level, what: str, *, where: str = "", hint: str = "") -> None:
        """Note what was found."""
        self.found.append(Check(name, level, *map(redacted, (what, where, hint))))

    def failed(self, name: str, error: SkdError) -> None:
        """Note an error, or each of several."""
        for each in error.errors if isinstance(error, SkdErrors) else [error]:
            self.add(name, "error", each.what, where=each.where, hint=each.hint)

    def attempt(self, name: str, look: Callable[[], T]) -> T | None:
        """Return the result of `look`, or None if it raised something, which is then noted; a bug of ours, too."""
        try:
            return look()
        except Exception as error:  # noqa: BLE001 - what nobody foresaw ends as a sentence too
            self.failed(name, explained(error))
            return None


def _markdown_cell(text: str) -> str:
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("\n", "<br>")


def distinct(runs: Sequence[RunConfig], what: Callable[[RunConfig], object]) -> list[RunConfig]:
    """The first of all runs that are alike in something."""
    keys = [what(run) for run in runs]
    return [run for number, run in enumerate(runs) if keys.index(keys[number]) == number]
