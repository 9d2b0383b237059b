"""The findings of `skd doctor` and of preflight: collected by `Checks`, shown as a table or as Markdown."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, TypeVar

from skd_lib._core.bugs import explained
from skd_lib._core.format import TextTable, markdown_table
from skd_lib._core.terminal import visible
from skd_lib._core.uris import redacted
from skd_lib.config import RunConfig
from skd_lib.errors import SkdError, SkdErrors, Transient

if TYPE_CHECKING:
    from rich.table import Table

Level = Literal["ok", "warning", "error"]
T = TypeVar("T")
TRACKING = "tracking"
_TRAINED = re.compile(r"\[\[.*?\]\]", re.DOTALL)
"""The tokens of an example that are trained on."""
_SYMBOLS: dict[Level, str] = {"ok": "✓", "warning": "!", "error": "✗"}
_COLOURS: dict[Level, str] = {"ok": "green", "warning": "yellow", "error": "red"}


@dataclass(frozen=True)
class Check:
    """One finding.

    Attributes:
        name: The thing that was checked.
        level: `error` keeps a run from starting.
        what: The finding.
        where: File, row, field or model; empty if there is none.
        hint: What to do about it; empty if nothing.
        transient: Whether it may pass by itself.
    """

    name: str
    level: Level
    what: str
    where: str = ""
    hint: str = ""
    transient: bool = False

    @property
    def text(self) -> str:
        """Return the finding and where it is, in characters that a terminal shows."""
        return visible(f"{self.where}: {self.what}" if self.where else self.what)


class Checks:
    """Collects findings; an error in one check does not keep the others from being made."""

    def __init__(self) -> None:
        self.found: list[Check] = []

    def add(
        self, name: str, level: Level, what: str, *, where: str = "", hint: str = "", transient: bool = False
    ) -> None:
        """Note a finding."""
        self.found.append(Check(name, level, redacted(what), redacted(where), redacted(hint), transient))

    def failed(self, name: str, error: SkdError, level: Level = "error") -> None:
        """Note an error, or each of several."""
        for each in error.errors if isinstance(error, SkdErrors) else [error]:
            transient = isinstance(each, Transient)
            self.add(name, level, each.what, where=each.where, hint=each.hint, transient=transient)

    def attempt(self, name: str, look: Callable[[], T], level: Level = "error") -> T | None:
        """Return the result of `look`, or None if it raises something, which is then noted; a bug of ours, too."""
        try:
            return look()
        except Exception as error:  # noqa: BLE001 - an unforeseen error ends as a sentence too
            self.failed(name, explained(error), level)
            return None


class Refused(SkdErrors):
    """Everything that keeps a run from starting, in few lines: people read the last ones of a step's log."""

    def __str__(self) -> str:
        return "\n".join([f"{self.what}:", *(f"- {error.line}" for error in self.errors)])


@dataclass
class PreflightReport:
    """The result of `run_checks`.

    Attributes:
        checks: The findings, in order.
        data_fingerprint: Identifies the data's content and preparation; empty if the data cannot be read.
        date: The date that chat templates print instead of today's; empty where none prints one.
        model_fingerprints: Identify each model's content, by its reference; without those that cannot be read.
        plan: Memory, time and cost by step; None if that cannot be said.
    """

    checks: list[Check] = field(default_factory=list)
    data_fingerprint: str = ""
    date: str = ""
    model_fingerprints: dict[str, str] = field(default_factory=dict)
    plan: TextTable | None = None

    @property
    def tracking_works(self) -> bool:
        """Return whether the tracking store answered (or tracking is off)."""
        return not any(check.name == TRACKING and check.level == "error" for check in self.checks)

    def errors(self) -> list[SkdError]:
        """Return the errors that keep the run from starting."""
        return [
            (Transient if check.transient else SkdError)(check.what, where=check.where or check.name, hint=check.hint)
            for check in self.checks
            if check.level == "error"
        ]

    def raise_errors(self) -> None:
        """Raise the errors that keep the run from starting, if there are any."""
        if errors := self.errors():
            raise Refused(errors)

    def table(self) -> Table:
        """Return the report for a terminal."""
        return table("Preflight", self.checks)

    def markdown(self) -> str:
        """Return the report as a Markdown table."""
        rows = [(_SYMBOLS[check.level], check.name, check.text, visible(check.hint)) for check in self.checks]
        lines = markdown_table(("", "check", "found", "what to do"), rows, numbers=False)
        plan = ["", *self.plan.to_markdown()] if self.plan else []
        return "\n".join(["# Preflight", "", *lines, *plan]) + "\n"


def table(title: str, checks: Sequence[Check]) -> Table:
    """Return findings as a table for a terminal."""
    from rich.table import Table
    from rich.text import Text

    shown = Table("", "check", "found", title=title)
    for check in checks:
        found = Text(check.text)
        if check.name == "example":
            found.highlight_regex(_TRAINED, "bold green")
        if check.hint:
            found.append(visible(f"\nhint: {check.hint}"), style="dim")
        shown.add_row(Text(_SYMBOLS[check.level], style=_COLOURS[check.level]), check.name, found)
    return shown


def distinct(runs: Sequence[RunConfig], key: Callable[[RunConfig], object]) -> list[RunConfig]:
    """Return the first of all runs that have the same key."""
    keys = [key(run) for run in runs]
    return [run for number, run in enumerate(runs) if keys.index(keys[number]) == number]
