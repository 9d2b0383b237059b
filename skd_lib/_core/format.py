"""Numbers, tables and errors as text for people."""

from __future__ import annotations

import textwrap
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

TERMINAL = 80
"""Columns of a usual terminal."""


def duration(seconds: float) -> str:
    """Return seconds as a person says them: `0.4 s`, `12 s`, `3 min 05 s`, `2 h 07 min`."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def plain(value: float) -> str:
    """Return a number with three significant digits; from 1000 on with all before the point."""
    return f"{value:,.3g}" if abs(value) < 999.5 else f"{value:,.0f}"


def count(number: float) -> str:
    """Return a number of tokens or parameters as people write it: `500`, `20k`, `134M`, `7.25B`."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"


def percent(share: float) -> str:
    """Return a share of 1 in per cent, with three significant digits; tiny ones are `below 0.01%`."""
    return "below 0.01%" if 0 < share < 0.0001 else f"{100 * share:.3g}%"


def decoding(temperature: float) -> str:
    """Name a way of decoding by its temperature: `greedy`, `temperature 0.7`."""
    return "greedy" if temperature == 0 else f"temperature {temperature:g}"


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: bool = True) -> list[str]:
    """Return the lines of a Markdown table; with `numbers` all columns but the first are aligned to the right."""
    ruler = ["---", *("---:" if numbers else "---" for _ in header[1:])]
    return [f"| {' | '.join(cells)} |" for cells in (header, ruler, *(map(_escaped, row) for row in rows))]


@dataclass(frozen=True)
class TextTable:
    """A table for a terminal or for Markdown, with a title above and a note below it.

    Rows whose first cells are `highlighted` are bold; with `numbers` all columns but the first are aligned right.
    """

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    highlighted: Collection[str] = ()
    numbers: bool = True

    def to_markdown(self) -> list[str]:
        """Return the lines of a section with the table."""
        table = markdown_table(self.header, self.rows, numbers=self.numbers)
        return [f"## {self.title}", "", *table, "", *([self.note, ""] if self.note else [])]

    def to_rich(self) -> Table:
        """Return the table for a `rich` console."""
        from rich import box
        from rich.table import Table
        from rich.text import Text

        table = Table(title=self.title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
        table.caption, table.caption_justify = self.note or None, "left"
        for number, name in enumerate(self._wrapped_header()):
            right = self.numbers and number
            table.add_column(name, justify="right" if right else "left", no_wrap=not number, overflow="fold")
        for row in self.rows:
            table.add_row(*map(Text, row), style="bold" if row[0] in self.highlighted else "")
        return table

    def _wrapped_header(self) -> list[str]:
        """Return the header, broken between words where they would make the table wider than a terminal."""
        cells = [max(map(len, column)) for column in zip(*self.rows, strict=True)] or [0] * len(self.header)
        widths = [max(width, len(name)) for width, name in zip(cells, self.header, strict=True)]
        if sum(widths) + 3 * len(widths) < TERMINAL:
            return list(self.header)
        least = [max(width, *map(len, name.split()), 1) for width, name in zip(cells, self.header, strict=True)]
        return [textwrap.fill(name, width) for width, name in zip(least, self.header, strict=True)]


def first_line(error: Exception) -> str:
    """Return the first line of an error's text, or its type's name where it has none."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _escaped(cell: str) -> str:
    return cell.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("\n", "<br>")
