"""The curves of a training, of its logged history."""

from __future__ import annotations

import pytest

from skd_lib.report.course import curves
from skd_lib.report.figures import learning_curves
from skd_lib.results import Course


def history(steps: int) -> list[dict[str, float]]:
    """A validation before the first step and after every second one."""
    entries: list[dict[str, float]] = [{"step": 0, "validation_loss": 3.0, "validation_loss_error": 0.5}]
    for step in range(1, steps + 1):
        entries.append(
            {
                "step": step,
                "loss": 2.0,
                "response_tokens": 10.0,
                "student_tokens": 30.0,
                "teacher_tokens": 20.0,
                "seconds_rollout": 1.0,
                "seconds_loss": 0.5,
                "seconds_optimiser": 0.25,
                "seconds_checkpoint": 9.0,
            }
        )
        if step % 2 == 0:
            entries.append(
                {"step": step, "validation_loss": 1.0, "validation_loss_error": 0.1, "seconds_validation": 8}
            )
    return entries


def test_each_validation_knows_what_was_spent_before_it() -> None:
    course = Course.model_validate(curves(history(4), batch_size=2))
    assert course.validation_steps == (0, 2, 4)
    assert course.validation_tokens == (0, 20, 40)
    assert course.validation_student_tokens == (0, 60, 120)
    assert course.validation_teacher_tokens == (0, 40, 80)
    assert course.validation_seconds == (0, 3.5, 7)  # without validations and checkpoints
    assert course.validation_half == pytest.approx((1.96 * 0.5, 0.196, 0.196), rel=1e-3)
    assert course.response_length == (5.0,) * 4


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_step_that_was_skipped_leaves_no_gap_in_the_charts(broken: float) -> None:
    entries = history(4)
    entries[1]["loss"] = broken
    course = Course.model_validate(curves(entries, batch_size=2))
    assert course.training_steps == (2, 3, 4)
    assert len(course.training_loss) == len(course.response_length) == 3
    assert len(learning_curves(course)[0].rows) == 4  # with the validation before the first step
    assert course.validation_tokens == (0, 20, 40)  # what was spent is spent


def test_an_unknown_interval_is_left_out() -> None:
    """A run that a version without errors began has none of its first validations."""
    entries = history(4)
    del entries[0]["validation_loss_error"]
    assert Course.model_validate(curves(entries, batch_size=2)).validation_half == ()


def test_long_curves_keep_their_axes_together() -> None:
    course = Course.model_validate(curves(history(2000), batch_size=2))
    lengths = {len(course.validation_loss), len(course.validation_tokens), len(course.validation_seconds)}
    assert lengths == {len(course.validation_half)} == {400}
    assert course.validation_tokens == tuple(sorted(course.validation_tokens))
