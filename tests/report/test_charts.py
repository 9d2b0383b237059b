"""Scales and curves."""

from __future__ import annotations

import itertools
import math
import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from skd_lib.report.charts import HEIGHT, WIDTH, Axis, Series, chart, inner_ticks, interval, nice_ticks, spread_out
from skd_lib.report.series import POINTS, smoothed, spread, thinned

X, Y = Axis("tokens (k)"), Axis("loss")
NUMBERS = st.floats(-1e6, 1e6, allow_nan=False).map(lambda x: round(x, 6))


@given(NUMBERS, NUMBERS)
@example(0.0, 5e-324)
def test_ticks_enclose_the_values_in_round_steps(low: float, high: float) -> None:
    low, high = min(low, high), max(low, high)
    ticks = nice_ticks(low, high)
    step = ticks[1] - ticks[0]
    slack = 1e-6 * step
    assert 2 <= len(ticks) <= 8
    assert ticks[0] <= low + slack
    assert high - slack <= ticks[-1]
    mantissa = step / 10 ** math.floor(math.log10(step) + 1e-9)
    assert min(abs(mantissa - nice) for nice in (1, 2, 5, 10)) < 1e-6


def test_ticks_of_usual_values() -> None:
    assert nice_ticks(0, 0.21) == [0, 0.1, 0.2, 0.3]
    assert nice_ticks(0.61, 1.92) == [0.5, 1, 1.5, 2]
    assert nice_ticks(0, 0) == [0, 0.5, 1]  # shares that are all 0 %
    assert nice_ticks(-1, -1) == [-2, -1.5, -1, -0.5, 0]
    assert nice_ticks(3, 3) == [0, 1, 2, 3]


def numbers(svg: str, attribute: str) -> list[float]:
    return [float(value) for value in re.findall(rf'\b{attribute}="(-?[\d.]+)"', svg)]


def marks(svg: str) -> list[tuple[float, float]]:
    """The middles of the points."""
    return [(float(x), float(y)) for x, y in re.findall(r'd="M(-?[\d.]+) (-?[\d.]+)m', svg)]


def drawn(*series: Series, x: Axis = X, y: Axis = Y) -> str:
    return str(chart(series, x, y, described_by="c"))


@given(st.floats(-1e6, 1e6), st.floats(0, 1e6))
@example(0.0, 5e-324)
def test_inner_ticks_are_between_the_ends(low: float, span: float) -> None:
    ticks = inner_ticks(low, low + span)
    assert 1 <= len(ticks) <= 7
    slack = 1e-6 * max(abs(low), span, 1)
    assert low - slack <= ticks[0] <= ticks[-1] <= low + span + slack


def test_whole_numbers_have_whole_ticks() -> None:
    assert inner_ticks(1, 3, whole=True) == [1, 2, 3]
    assert inner_ticks(0, 45, whole=True) == [0, 10, 20, 30, 40]
    assert inner_ticks(7, 7) == [7]


@pytest.mark.parametrize("values", [[1.0], [2.0, 2.0], [0.0, 1e-9], [5.0, -3.0, 1e6]])
def test_series_stay_within_the_chart(values: list[float]) -> None:
    ends = [value - 1 for value in values], [value + 2 for value in values]
    svg = drawn(Series("student", range(len(values)), values, "one", "one", *ends, shape="circle"))
    points = marks(svg)
    assert len(points) == len(values) + 1  # one more in the label
    assert all(0 <= x <= WIDTH and 0 <= y <= HEIGHT for x, y in points)
    assert all(0 <= y <= HEIGHT for name in ("y1", "y2") for y in numbers(svg, name))


def test_a_chart_says_what_it_is_and_names_its_axes() -> None:
    svg = drawn(Series("s0", [1, 2], [3, 4], "<b>", "<b>", shape="square"))
    assert 'role="img" aria-labelledby="c-title" aria-describedby="c-note"' in svg
    assert "tokens (k)</text>" in svg
    assert "loss</text>" in svg
    assert "&lt;b&gt;</text>" in svg
    assert "<title>&lt;b&gt;: 3, tokens (k) 1</title>" in svg
    assert "<b>" not in svg


def test_intervals_are_whiskers_of_few_points_and_a_band_of_many() -> None:
    def series(points: int) -> str:
        values = [float(point) for point in range(points)]
        low, high = [value - 1 for value in values], [value + 1 for value in values]
        return drawn(Series("s0", values, values, low=low, high=high))

    few, many = series(3), series(20)
    assert (few.count('class="whisker'), few.count("<polygon")) == (9, 0)  # a line and two caps each
    assert (many.count('class="whisker'), many.count("<polygon")) == (0, 1)
    lowest, highest = max(numbers(few, "y2")), min(numbers(few, "y1"))
    assert lowest > marks_of_line(few)[0] > marks_of_line(few)[-1] > highest


def marks_of_line(svg: str) -> list[float]:
    (points,) = re.findall(r'<polyline class="[^"]*" points="([^"]+)"', svg)
    return [float(point.split(",")[1]) for point in points.split()]


def test_series_differ_in_more_than_colour() -> None:
    svg = drawn(
        Series("s0", [1, 2], [3, 4], "a", "a", shape="circle"),
        Series("s1 dashed", [1, 2], [4, 3], "b", "b", shape="plus"),
    )
    shapes = re.findall(r'<path class="dot (s\d)[^"]*" d="M[-\d.]+ [-\d.]+([^"]+)"', svg)
    assert len(set(shapes)) == len({shape for _, shape in shapes}) == len({color for color, _ in shapes}) == 2


@given(st.lists(st.floats(0, 100), max_size=8))
def test_labels_keep_apart_in_order_and_inside(places: list[float]) -> None:
    moved = spread_out(places, 10, 0, 100)
    ordered = sorted(moved)
    assert all(after - before >= 10 - 1e-6 for before, after in itertools.pairwise(ordered))
    assert all(-1e-6 <= place <= 100 + 1e-6 for place in moved)
    assert [places[i] for i in sorted(range(len(places)), key=moved.__getitem__)] == sorted(places)


def test_labels_move_no_more_than_they_must() -> None:
    assert spread_out([10, 50, 52, 90], 14, 0, 100) == [10, 44, 58, 90]
    assert spread_out([98, 99], 10, 0, 100) == [90, 100]
    assert spread_out([], 10, 0, 100) == []


def test_intervals_share_a_scale() -> None:
    svg = interval(5.0, 0.0, 10.0, (0.0, 10.0), "student")
    assert numbers(svg, "cx") == [100.0]
    assert numbers(svg, "x1")[1] < 100 < numbers(svg, "x2")[1]


def test_long_curves_are_averaged_and_short_ones_left_alone() -> None:
    assert thinned([1, 2, 3], [0.5, 0.1, 0.2]) == ([1, 2, 3], [0.5, 0.1, 0.2])
    steps, values = thinned(range(1, 10_001), [float(step % 2) for step in range(10_000)])
    assert len(steps) == len(values) == POINTS
    assert (steps[0], steps[-1]) == (25, 10_000)
    assert sum(values) / len(values) == pytest.approx(0.5, abs=0.01)
    assert smoothed([0, 3, 0, 3], 3) == [1.5, 1, 2, 1.5]


def test_spread_values_keep_the_ends() -> None:
    assert spread([1, 2, 3], 5) == [1, 2, 3]
    assert spread(range(101), 5) == [0, 25, 50, 75, 100]
