"""A figure of a page: a chart with its words, and the same numbers as a table and as a CSV file, without a script."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from typing import NamedTuple
from urllib.parse import quote

from markupsafe import Markup

from skd_lib.report.charts import Axis, Series, chart
from skd_lib.report.series import spread

TABLE_ROWS = 30
"""Of a long table; the CSV file has all."""
_Cell = str | float | None


class Figure(NamedTuple):
    """A chart with its words and its table, or the reason why there is none.

    `name` is unique on the page, for ids; `rows` are at most `TABLE_ROWS` of `total`; `file` is an address that holds
    the CSV file.
    """

    name: str
    title: str
    note: str = ""
    chart: Markup = Markup("")
    missing: str = ""
    header: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    total: int = 0
    file: str = ""


def figure(title: str, note: str, series: Sequence[Series], x: Axis, y: Axis) -> Figure:
    """Draw series and put their numbers into a table; the title is unique on the page."""
    name = _name(title)
    named = [one for one in series if one.name]
    header, rows = _by_place(named, x) if any(one.joined for one in named) else _by_name(named, x, y)
    return Figure(
        name=name,
        title=title,
        note=note,
        chart=chart(series, x, y, described_by=name),
        header=header,
        rows=[[_shown(cell) for cell in row] for row in spread(rows, TABLE_ROWS)],
        total=len(rows),
        file=f"data:text/csv;charset=utf-8,{quote(_csv(header, rows), safe=',')}",
    )


def missing(title: str, reason: str) -> Figure:
    """Return the place of a figure that cannot be drawn, with the reason."""
    return Figure(_name(title), title, missing=reason)


def _name(title: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")


def _by_place(series: Sequence[Series], x: Axis) -> tuple[list[str], list[list[_Cell]]]:
    """Return a row for each place on the horizontal axis, with a column for each series."""
    header, columns = [x.name], []
    for one in series:
        for name, values in ((one.name, one.ys), (f"{one.name}, low", one.low), (f"{one.name}, high", one.high)):
            if values:
                header.append(name)
                columns.append(dict(zip(one.xs, values, strict=True)))
    places = sorted({at for one in series for at in one.xs})
    return header, [[at, *(column.get(at) for column in columns)] for at in places]


def _by_name(series: Sequence[Series], x: Axis, y: Axis) -> tuple[list[str], list[list[_Cell]]]:
    """Return a row for each point, with the name of its series."""
    ends = any(one.low for one in series)
    rows: list[list[_Cell]] = [
        [one.name, at, height, *((one.low[i], one.high[i]) if one.low else (None, None) if ends else ())]
        for one in series
        for i, (at, height) in enumerate(one.points)
    ]
    return ["", x.name, y.name, *(["low", "high"] if ends else [])], rows


def _shown(cell: _Cell) -> str:
    if cell is None or isinstance(cell, str):
        return cell or ""
    return f"{cell:,.0f}" if float(cell).is_integer() or abs(cell) >= 10_000 else f"{cell:.4g}"


def _csv(header: Sequence[str], rows: Sequence[Sequence[_Cell]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(map(_kept, header))
    writer.writerows([map(_kept, row) for row in rows])
    return text.getvalue()


def _kept(cell: _Cell) -> str | float | None:
    """Return a cell of the file; a name that a spreadsheet would take for a formula is quoted."""
    if isinstance(cell, str):
        return f"'{cell}" if cell.startswith(("=", "+", "-", "@")) else cell
    return f"{cell:.6g}" if isinstance(cell, float) else cell
