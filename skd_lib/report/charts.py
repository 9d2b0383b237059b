"""Charts as inline SVG: lines and points with intervals, each labelled where it is, on axes with names.

Colours, dashes and themes are the page's CSS classes. Nothing is told by colour alone: series differ in shape and dash
too, and stand as a table next to the chart (`skd_lib.report.figure`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from skd_lib._core.format import plain

WIDTH, HEIGHT = 420, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 48, 14, 30, 44
_LABEL_GAP, _LABEL_LENGTH, _CHARACTER = 14, 18, 6.6
"""Between labels; most characters of one; width of one. In the chart's units, as all sizes here."""
_BAND_FROM = 13
"""Points from which on intervals are drawn as a band, not as whiskers."""
_FINEST = 1e-11
"""Values that differ by less are drawn as equal: ticks have twelve places."""
Format = Callable[[float], str]
SHAPES = {
    "circle": "m-3.4 0a3.4 3.4 0 1 0 6.8 0a3.4 3.4 0 1 0 -6.8 0z",
    "square": "m-3.1 -3.1h6.2v6.2h-6.2z",
    "triangle": "m0 -4.2l4.2 7.2h-8.4z",
    "diamond": "m0 -4.6l4.6 4.6l-4.6 4.6l-4.6 -4.6z",
    "inverted": "m0 4.2l4.2 -7.2h-8.4z",
    "plus": "m-1.3 -4.2h2.6v2.9h2.9v2.6h-2.9v2.9h-2.6v-2.9h-2.9v-2.6h2.9z",
}
"""Marks of points, drawn from their middle."""


@dataclass(frozen=True)
class Axis:
    """An axis: its name with the unit, how its numbers are written, and where it begins."""

    name: str
    number: Format = plain
    from_zero: bool = False
    whole: bool = False
    """Only whole numbers have ticks."""


@dataclass(frozen=True)
class Series:
    """Points of one kind, with or without a line.

    `kind` are CSS classes: the colour (`student`, `teacher`, `neutral`, `s0` to `s5`), and of the line `dashed`,
    `dotted`, `dashdot` or `faint`. `name` is for tables, `label` for the end of the line; empty: none. `low` and `high`
    are the ends of the 95 % intervals; `shape` is the mark of each point, of `SHAPES`.
    """

    kind: str
    xs: Sequence[float]
    ys: Sequence[float]
    name: str = ""
    label: str = ""
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    shape: str = ""
    joined: bool = True

    @property
    def points(self) -> list[tuple[float, float]]:
        """The points."""
        return list(zip(self.xs, self.ys, strict=True))


def chart(series: Sequence[Series], x: Axis, y: Axis, *, described_by: str) -> Markup:
    """Draw series on common axes.

    Later series are in front; the ids `DESCRIBED_BY-title` and `-note` hold the chart's name and description.
    """
    xs = [value for one in series for value in one.xs]
    heights = [value for one in series for value in (*one.ys, *one.low, *one.high)]
    labels = [one.label for one in series if one.label]
    right = max([_RIGHT, *(_CHARACTER * len(_cut(label)) + 38 for label in labels)])
    ticks = nice_ticks(0.0 if y.from_zero else min(heights), max(heights))
    across = Scale(0.0 if x.from_zero else min(xs), max(xs), _LEFT, WIDTH - right)
    up = Scale(ticks[0], ticks[-1], HEIGHT - _BOTTOM, _TOP)
    marks = [_axes(across, up, ticks, x, y)]
    marks += [_interval(one, across, up) for one in series if one.low]
    for one in series:
        if one.joined:
            path = " ".join(f"{_number(across(at))},{_number(up(height))}" for at, height in one.points)
            marks.append(_tag("polyline", f"line {one.kind}", points=path))
        marks += [_mark(one, place, across, up, x, y) for place in range(len(one.xs)) if one.shape]
    marks += _labels([one for one in series if one.label], across, up)
    return _svg(WIDTH, HEIGHT, marks, described_by)


def interval(score: float, low: float, high: float, scale: tuple[float, float], kind: str) -> Markup:
    """Draw a score as a dot on its 95 % interval, on a scale that several of them share."""
    across = Scale(*scale, 6, 194)
    marks = [
        _tag("line", "axis", x1=6, x2=194, y1=10, y2=10),
        _tag("line", f"whisker thick {kind}", x1=across(low), x2=across(high), y1=10, y2=10),
        _tag("circle", f"dot {kind}", cx=across(score), cy=10, r=5),
    ]
    return _svg(200, 20, marks)


def bars(heights: Sequence[float], kind: str, *, width: int = 160, height: int = 34, stretch: bool = False) -> Markup:
    """Draw bars side by side, without axes: the shape of a distribution. `stretch`: as wide as there is room."""
    top = max(heights, default=0) or 1
    room = width / max(len(heights), 1)
    marks = [_tag("line", "axis", x1=0, x2=width, y1=height, y2=height)]
    for index, value in enumerate(heights):
        tall = max(height * value / top, 0.75 if value else 0.0)
        marks.append(_tag("rect", f"bar {kind}", x=index * room + 0.5, y=height - tall, width=room - 1, height=tall))
    return _svg(width, height, marks, stretch=stretch)


def share(part: float, kind: str) -> Markup:
    """Draw a part of the whole as a horizontal bar that takes whatever width there is."""
    marks = [
        _tag("rect", name, width=width, height=8, rx=1)
        for name, width in (("track", 200), (f"bar {kind}", 200 * min(part, 1.0)))
    ]
    return _svg(200, 8, marks, stretch=True)


def nice_ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Return about `count` + 1 round numbers (1, 2 or 5 times a power of ten apart) that enclose both."""
    if high - low < _FINEST:
        low, high = (0.0, high if high > _FINEST else 1.0) if high >= 0 else (low - 1.0, low + 1.0)
    step = _nice_step(low, high, count)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def inner_ticks(low: float, high: float, count: int = 5, *, whole: bool = False) -> list[float]:
    """Return about `count` round numbers between both, ends included; the low end where there is none."""
    if high - low < _FINEST:
        return [low]
    step = _nice_step(low, high, count)
    if whole:
        step = max(1.0, round(step))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)] or [low]


@dataclass(frozen=True)
class Scale:
    """A linear map of [low, high] to [start, end]."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        """Return the place of a value; one outside is moved to the nearer end."""
        share = (value - self.low) / (self.high - self.low) if self.high > self.low else 0.5
        return self.start + min(max(share, 0.0), 1.0) * (self.end - self.start)


def spread_out(places: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Move places apart to at least `gap`, in their order and as little as possible, between both ends if they fit.

    Neighbours that are too close become a block around their mean (isotonic regression of the places less their gaps).
    """
    order = sorted(range(len(places)), key=places.__getitem__)
    blocks: list[tuple[float, int]] = []  # of mean and size
    for rank, index in enumerate(order):
        mean, size = places[index] - rank * gap, 1
        while blocks and blocks[-1][0] > mean:
            before, count = blocks.pop()
            mean, size = (before * count + mean * size) / (count + size), count + size
        blocks.append((mean, size))
    top = max(low, high - gap * (len(places) - 1))
    starts = [min(max(mean, low), top) for mean, size in blocks for _ in range(size)]
    moved = dict(zip(order, (start + rank * gap for rank, start in enumerate(starts)), strict=True))
    return [moved[index] for index in range(len(places))]


def _nice_step(low: float, high: float, count: int) -> float:
    raw = (high - low) / count
    power: float = 10.0 ** math.floor(math.log10(raw))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * (1 - 1e-9))


def _axes(across: Scale, up: Scale, ticks: Sequence[float], x: Axis, y: Axis) -> Markup:
    left, right, bottom = across.start, across.end, HEIGHT - _BOTTOM
    marks = [_text("axis-name", 2, 13, y.name, "start"), _text("axis-name", right, HEIGHT - 6, x.name, "end")]
    for index, tick in enumerate(ticks):
        height = up(tick)
        marks.append(_tag("line", "grid" if index else "axis", x1=left, x2=right, y1=height, y2=height))
        marks.append(_text("tick", left - 7, height + 4, y.number(tick), "end"))
    for tick in inner_ticks(across.low, across.high, whole=x.whole):
        at = across(tick)
        marks.append(_tag("line", "axis", x1=at, x2=at, y1=bottom, y2=bottom + 4))
        marks.append(_text("tick", at, bottom + 17, x.number(tick)))
    return Markup("").join(marks)


def _interval(one: Series, across: Scale, up: Scale) -> Markup:
    """Draw the intervals of a series: a band of many that are joined, else whiskers."""
    if one.joined and len(one.xs) >= _BAND_FROM:
        ends = [*zip(one.xs, one.high, strict=True), *reversed(list(zip(one.xs, one.low, strict=True)))]
        path = " ".join(f"{_number(across(at))},{_number(up(height))}" for at, height in ends)
        return _tag("polygon", f"band {one.kind}", points=path)
    marks = []
    for at, low, high in zip(map(across, one.xs), map(up, one.low), map(up, one.high), strict=True):
        marks.append(_tag("line", f"whisker {one.kind}", x1=at, x2=at, y1=low, y2=high))
        marks += [_tag("line", f"whisker {one.kind}", x1=at - 3.5, x2=at + 3.5, y1=end, y2=end) for end in (low, high)]
    return Markup("").join(marks)


def _mark(one: Series, place: int, across: Scale, up: Scale, x: Axis, y: Axis) -> Markup:
    """Draw a point, whose figures a pointer over it shows."""
    at, height = one.points[place]
    words = f"{one.name or one.label}: {y.number(height)}"
    if one.low:
        words += f" ({y.number(one.low[place])} to {y.number(one.high[place])})"
    path = _shape(one, across(at), up(height))
    title = Markup("<title>{}, {} {}</title>").format(words, x.name, x.number(at))
    return Markup('<path class="dot {}" d="{}">{}</path>').format(one.kind, path, title)


def _labels(series: Sequence[Series], across: Scale, up: Scale) -> list[Markup]:
    """List the labels at the right, each as near as can be to the height of its last point, with its mark."""
    heights = spread_out([up(one.ys[-1]) for one in series], _LABEL_GAP, _TOP, HEIGHT - _BOTTOM)
    start, marks = across.end + 9, []
    for one, height in zip(series, heights, strict=True):
        if one.joined:
            marks.append(_tag("line", f"line {one.kind}", x1=start, x2=start + 18, y1=height, y2=height))
        if one.shape:
            marks.append(_tag("path", f"dot {one.kind}", d=_shape(one, start + 9, height)))
        marks.append(_text("label", start + 24, height + 4, _cut(one.label), "start"))
    return marks


def _shape(one: Series, x: float, y: float) -> str:
    return f"M{_number(x)} {_number(y)}{SHAPES[one.shape]}"


def _cut(label: str) -> str:
    return label if len(label) <= _LABEL_LENGTH else f"{label[: _LABEL_LENGTH - 1]}…"


def _svg(width: int, height: int, marks: Sequence[Markup], described_by: str = "", *, stretch: bool = False) -> Markup:
    spoken = Markup('aria-hidden="true"')
    if described_by:
        spoken = Markup('role="img" aria-labelledby="{0}-title" aria-describedby="{0}-note"').format(described_by)
    return Markup('<svg viewBox="0 0 {} {}" {} {}>{}</svg>').format(
        width, height, Markup('preserveAspectRatio="none"') if stretch else "", spoken, Markup("").join(marks)
    )


def _tag(name: str, css_class: str, **attributes: float | str) -> Markup:
    values = ((key, _number(value) if isinstance(value, int | float) else value) for key, value in attributes.items())
    drawn = Markup("").join(Markup(' {}="{}"').format(key, value) for key, value in values)
    return Markup('<{} class="{}"{}/>').format(Markup(name), css_class, drawn)  # noqa: S704 - our own names


def _text(css_class: str, x: float, y: float, text: str, anchor: str = "middle") -> Markup:
    element = Markup('<text class="{}" x="{}" y="{}" text-anchor="{}">{}</text>')
    return element.format(css_class, _number(x), _number(y), anchor, text)


def _number(value: float) -> str:
    return str(escape(f"{value:.1f}".removesuffix(".0")))
