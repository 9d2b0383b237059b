"""The expected gain, against brute force and the figures of Leviathan et al."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skd_lib.results import Forwards
from skd_lib.sampling.drafting import expected_tokens
from skd_lib.specdec.theory import (
    block_seconds,
    break_even,
    measure_forwards,
    speedup,
    speedup_of_paper,
    stretched,
)
from tests.conftest import TinyModel

rates = st.floats(0, 1)


def forwards(draft: float, teacher: dict[int, float]) -> Forwards:
    return Forwards(draft_seconds=draft, draft_start_seconds=draft, teacher_seconds=teacher)


@given(st.lists(rates, max_size=6))
def test_expected_tokens_by_enumeration(acceptance: list[float]) -> None:
    """Over all outcomes of independent tests: the accepted prefix, and the teacher's own token."""
    expected = 0.0
    for outcome in itertools.product([True, False], repeat=len(acceptance)):
        probability = math.prod(
            rate if accepted else 1 - rate for rate, accepted in zip(acceptance, outcome, strict=True)
        )
        expected += probability * (1 + len(list(itertools.takewhile(bool, outcome))))
    assert expected_tokens(acceptance) == pytest.approx(expected)


@given(st.floats(0, 0.999), st.integers(1, 8), st.integers(1, 100).map(lambda c: c / 100))
def test_with_equal_rates_it_is_theorem_3_8(rate: float, gamma: int, cost: float) -> None:
    times = forwards(cost, {1: 1.0, gamma + 1: 1.0})
    paper = (1 - rate ** (gamma + 1)) / ((1 - rate) * (gamma * cost + 1))
    assert speedup_of_paper(times, rate, gamma) == pytest.approx(paper)
    assert speedup(times, [rate] * gamma, gamma) == pytest.approx(paper)  # a block as cheap as a token: the same


@given(st.lists(rates, min_size=3, max_size=3), st.integers(1, 200), st.integers(100, 200))
def test_a_draft_at_the_break_even_neither_gains_nor_loses(acceptance: list[float], cost: int, block: int) -> None:
    teacher = {1: 1.0, 4: block / 100}
    share = break_even(forwards(cost / 100, teacher), expected_tokens(acceptance), 3)
    assert speedup(forwards(share * cost / 100, teacher), acceptance, 3) == pytest.approx(1, rel=1e-4)


def test_figures_of_the_paper() -> None:
    # Figure 2: at a = 0.8 a block of 5 drafts yields 3.69 tokens on average.
    assert expected_tokens([0.8] * 5) == pytest.approx(3.69, abs=0.005)
    assert expected_tokens([1.0] * 5) == 6


def test_a_slow_block_costs_its_gain() -> None:
    cheap = forwards(0.1, {1: 1.0, 4: 1.0})
    slow = forwards(0.1, {1: 1.0, 4: 2.6})
    assert speedup(slow, [0.8] * 3, 3) == pytest.approx(speedup(cheap, [0.8] * 3, 3) * 1.3 / 2.9)
    assert speedup_of_paper(slow, 0.8, 3) == speedup_of_paper(cheap, 0.8, 3)


def test_rates_of_positions_that_were_not_tested() -> None:
    assert stretched([0.9, 0.5], 4) == [0.9, 0.5, 0.5, 0.5]
    assert stretched([0.9, 0.5], 1) == [0.9]
    assert stretched([], 2) == [1.0, 1.0]


def test_forwards_are_timed(tiny_model: TinyModel) -> None:
    teacher, draft = tiny_model(layers=6, hidden=64), tiny_model(layers=1)
    times = measure_forwards(teacher, draft, rows=2, positions=20, gammas=[1, 4, 30], repeats=5)
    assert list(times.teacher_seconds) == [1, 2, 5, 31]
    assert 0 < times.draft_seconds < times.teacher_seconds[1]
    block = times.draft_start_seconds + 3 * times.draft_seconds + times.teacher_seconds[5]
    assert block_seconds(times, 4) == block
