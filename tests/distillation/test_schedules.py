"""Settings that change in the course of training."""

from __future__ import annotations

import pytest

from skd_lib.config import Schedule
from skd_lib.distillation.rollouts import value_at


def test_a_number_stays() -> None:
    assert [value_at(0.3, step, 10) for step in (0, 5, 9)] == [0.3] * 3


@pytest.mark.parametrize("shape", ["linear", "cosine"])
def test_a_schedule_goes_from_start_to_end_and_does_not_turn_back(shape: str) -> None:
    schedule = Schedule[float](start=0.5, end=0.25, shape=shape)  # type: ignore[arg-type]
    values = [value_at(schedule, step, 11) for step in range(11)]
    assert (values[0], values[5], values[10]) == pytest.approx((0.5, 0.375, 0.25))
    assert values == sorted(values, reverse=True)
    assert value_at(schedule, 25, 11) == 0.25  # a run that goes on longer than it was planned
    assert value_at(schedule, 0, 1) == 0.5


def test_shapes() -> None:
    linear, cosine = (Schedule[int](start=0, end=100, shape=shape) for shape in ("linear", "cosine"))
    assert [value_at(linear, step, 5) for step in range(5)] == [0, 25, 50, 75, 100]
    assert [round(value_at(cosine, step, 5), 4) for step in range(5)] == [0, 14.6447, 50, 85.3553, 100]
    assert str(cosine) == "0 to 100, cosine"
