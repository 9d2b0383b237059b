"""Small charts as inline SVG.

Colours are the page's CSS classes, so that they follow its light and dark themes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

WIDTH, HEIGHT = 480, 210
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 12, 10, 26
Format = Callable[[float], str]


@dataclass(frozen=True)
class Series:
    """One line of a chart.

    Attributes:
        kind: CSS class: `student`, `teacher`, `neutral`, with `faint` (background) or `theory` (dashed) added.
        steps: Where the points are.
        values: Their heights.
        dots: Mark each point, for few of them.
    """

    kind: str
    steps: Sequence[int]
    values: Sequence[float]
    dots: bool = False


def line_chart(series: Sequence[Series], *, label: str, number: Format, from_zero: bool = False) -> Markup:
    """Draw lines over training steps.

    Args:
        series: At least one with points.
        label: Description for people who cannot see the chart.
        number: Formats the heights' ticks.
        from_zero: The heights begin at 0 rather than near the lowest value.
    """
    steps = [step for one in series for step in one.steps]
    values = [value for one in series for value in one.values]
    across = _Scale(min(steps), max(steps), _LEFT, WIDTH - _RIGHT)
    ticks = nice_ticks(0.0 if from_zero else min(values), max(values))
    up = _Scale(ticks[0], ticks[-1], HEIGHT - _BOTTOM, _TOP)
    marks = [_grid(up, ticks, number)]
    marks += [
        _text("tick", across(step), HEIGHT - 8, f"{step:,}", anchor)
        for step, anchor in _step_ticks(min(steps), max(steps))
    ]
    for one in series:
        points = [(across(step), up(value)) for step, value in zip(one.steps, one.values, strict=True)]
        path = " ".join(f"{_number(x)},{_number(y)}" for x, y in points)
        marks.append(_tag("polyline", f"line {one.kind}", points=path))
        if one.dots:
            marks += [_tag("circle", f"dot {one.kind}", cx=x, cy=y, r=3.5) for x, y in points]
    return _svg(WIDTH, HEIGHT, marks, label)


def bar_chart(groups: Sequence[tuple[str, Sequence[tuple[str, float]]]], *, label: str, number: Format) -> Markup:
    """Draw groups of bars from 0 up, each with its figure above it.

    Args:
        groups: Name of each group, and the kind (CSS class) and height of each of its bars.
        label: Description for people who cannot see it.
        number: Formats the figures.
    """
    values = [value for _, bars in groups for _, value in bars]
    ticks = nice_ticks(0.0, max(values))
    up = _Scale(ticks[0], ticks[-1], HEIGHT - _BOTTOM, _TOP + 12)
    room = (WIDTH - _LEFT - _RIGHT) / len(groups)
    width = min(34.0, room * 0.72 / max(len(bars) for _, bars in groups))
    marks = [_grid(up, ticks, number)]
    for index, (name, bars) in enumerate(groups):
        middle = _LEFT + room * (index + 0.5)
        marks.append(_text("tick", middle, HEIGHT - 8, name))
        for place, (kind, value) in enumerate(bars):
            x, y = middle + width * (place - len(bars) / 2), up(value)
            marks.append(_tag("rect", f"bar {kind}", x=x + 1, y=y, width=width - 2, height=up(0) - y, rx=2))
            if width >= 24:
                marks.append(_text("figure", x + width / 2, y - 5, number(value)))
    return _svg(WIDTH, HEIGHT, marks, label)


def interval(score: float, low: float, high: float, scale: tuple[float, float], kind: str) -> Markup:
    """Draw a score as a dot on its 95 % interval, on a scale that several of them share."""
    across = _Scale(*scale, 6, 194)
    marks = [
        _tag("line", "axis", x1=6, x2=194, y1=10, y2=10),
        _tag("line", f"whisker {kind}", x1=across(low), x2=across(high), y1=10, y2=10),
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
    if high <= low:
        low, high = (0.0, high or 1.0) if high >= 0 else (low - 1.0, low + 1.0)
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


@dataclass(frozen=True)
class _Scale:
    """A linear map of [low, high] to [start, end]."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low) if self.high > self.low else 0.5
        return self.start + min(max(share, 0.0), 1.0) * (self.end - self.start)


def _grid(up: _Scale, ticks: Sequence[float], number: Format) -> Markup:
    marks = []
    for index, tick in enumerate(ticks):
        y = up(tick)
        marks.append(_tag("line", "grid" if index else "axis", x1=_LEFT, x2=WIDTH - _RIGHT, y1=y, y2=y))
        marks.append(_text("tick", _LEFT - 7, y + 4, number(tick), "end"))
    return Markup("").join(marks)


def _step_ticks(first: int, last: int) -> list[tuple[int, str]]:
    """Return the first step, the last and the middle one, and where their labels are anchored."""
    middle = (first + last) // 2
    ticks = [(first, "start"), (middle, "middle"), (last, "end")]
    return [tick for index, tick in enumerate(ticks) if tick[0] not in {step for step, _ in ticks[:index]}]


def _svg(width: int, height: int, marks: Sequence[Markup], label: str = "", *, stretch: bool = False) -> Markup:
    spoken = Markup('role="img" aria-label="{}"').format(label) if label else Markup('aria-hidden="true"')
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
