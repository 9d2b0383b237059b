"""Scales and curves."""

from __future__ import annotations

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skd_lib.report.charts import (
    HEIGHT,
    WIDTH,
    Series,
    bar_chart,
    interval,
    line_chart,
    nice_ticks,
)
from skd_lib.report.series import POINTS, smoothed, thinned

NUMBERS = st.floats(-1e6, 1e6, allow_nan=False).map(lambda x: round(x, 6))


@given(NUMBERS, NUMBERS)
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


@pytest.mark.parametrize("values", [[1.0], [2.0, 2.0], [0.0, 1e-9], [5.0, -3.0, 1e6]])
def test_lines_stay_within_the_chart(values: list[float]) -> None:
    svg = line_chart([Series("student", range(len(values)), values, dots=True)], label="<b>", number="{:g}".format)
    assert len(numbers(svg, "cx")) == len(values)
    assert all(0 <= x <= WIDTH for x in numbers(svg, "cx"))
    assert all(0 <= y <= HEIGHT for y in numbers(svg, "cy"))
    assert 'aria-label="&lt;b&gt;"' in svg


def test_bars_have_the_heights_of_their_values() -> None:
    svg = bar_chart([("1", [("neutral", 0.2), ("student", 0.4)]), ("2", [("student", 0.0)])], label="", number=str)
    first, second, third = numbers(svg, "height")
    assert second == pytest.approx(2 * first, abs=0.2)
    assert third == 0


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
