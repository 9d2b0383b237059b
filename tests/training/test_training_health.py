"""Broken steps and responses of the wrong length are recognised from the logged figures."""

from __future__ import annotations

from typing import Any

import pytest

from skd_lib.training.figures import broken_step, response_trouble, skipped_steps

NAN, INF = float("nan"), float("inf")


def test_skipped_steps_are_counted_in_all_and_in_a_row() -> None:
    def counted(*counts: int) -> tuple[int, int]:
        history: list[dict[str, float]] = [{"validation_loss": 1.0}]
        for count in counts:
            history += [{"loss": 1.0, "skipped_steps": count}, {"validation_loss": 1.0}]
        return skipped_steps(history)

    assert counted() == (0, 0)
    assert counted(0, 0) == (0, 0)
    assert counted(1) == (1, 1)
    assert counted(0, 1, 1, 2, 3) == (3, 2)
    assert counted(0, 1, 2, 2) == (2, 0)


@pytest.mark.parametrize(
    ("loss", "norm", "reason"),
    [
        (2.0, 1e6, ""),  # clipping is for that
        (NAN, 1.0, "the loss is nan"),
        (INF, 1.0, "the loss is inf"),
        (2.0, NAN, "the norm of the gradient is nan"),
        (19.9, 1.0, ""),
        (20.1, 1.0, "the loss is 20.1, 10 times the median of the last 12 steps"),
    ],
)
def test_a_step_is_broken_by_its_loss_or_gradient(loss: float, norm: float, reason: str) -> None:
    history = [{"loss": value} for value in (*[1.0] * 3, NAN, *[2.0] * 6, *[9.0] * 3)]
    assert broken_step(loss, norm, history, explosion_factor=10) == reason


def test_few_losses_and_zero_losses_say_nothing_about_an_explosion() -> None:
    assert broken_step(1e9, 1.0, [{"loss": 1.0}] * 9, explosion_factor=10) == ""
    assert broken_step(1e9, 1.0, [{"loss": 0.0}] * 20, explosion_factor=10) == ""


@pytest.mark.parametrize(
    ("first", "last", "trouble"),
    [
        ((20.0, 0.1), (21.0, 0.2), ""),
        ((20.0, 0.1), (31.0, 0.95), "no longer end: 95% of the last 10 steps' were cut at max_new_tokens, 10% at"),
        ((32.0, 1.0), (32.0, 1.0), ""),  # a limit that is too low from the start
        ((20.0, 0.1), (1.2, 0.0), r"collapsed to 1.2 tokens on average, from 20.0 at the start"),
        ((1.4, 0.0), (1.2, 0.0), ""),  # a task of one-token answers
    ],
)
def test_lengths_that_explode_or_collapse_are_told(
    first: tuple[float, float], last: tuple[float, float], trouble: str
) -> None:
    def entries(length: float, cut: float) -> list[dict[str, Any]]:
        return [{"loss": 1.0}, {"response_length_mean": length, "truncated_fraction": cut}] * 10

    found = response_trouble([*entries(*first), *entries(*last)])
    assert trouble in found if trouble else not found
    assert not response_trouble(entries(*last))
