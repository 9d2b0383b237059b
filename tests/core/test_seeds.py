"""No two seeds, epochs, steps or rows share their random numbers."""

from __future__ import annotations

import pytest

from skd_lib._core.seeds import derived, generator, uniform
from skd_lib.sampling.distributions import row_uniforms
from skd_lib.training.trainer import TrainingStream


@pytest.mark.parametrize("apart", [1, 2**10, 2**12, 2**20, 2**30])
def test_different_seeds_have_different_orders_in_every_epoch(apart: int) -> None:
    examples, epochs = 30, 3
    orders = {
        tuple(stream.example(epoch * examples + offset) for offset in range(examples))
        for stream in (TrainingStream(examples, batch_size=4, seed=seed) for seed in (0, apart, 2**31 - 1 - apart))
        for epoch in range(epochs)
    }
    assert len(orders) == 3 * epochs


@pytest.mark.parametrize("bit", [0, 1, 31, 32, 33, 62])
def test_a_rows_numbers_depend_on_every_bit_of_its_seed(bit: int) -> None:
    assert not row_uniforms(5, 4, 3).equal(row_uniforms(5 ^ (1 << bit), 4, 3))
    assert row_uniforms(5, 4, 3).equal(row_uniforms(5, 4, 3))


def test_neighbouring_seeds_share_no_place() -> None:
    """Seed 1 at row 0 is not seed 0 at row 1."""
    found = {derived("row", seed, step, row) for seed in range(8) for step in range(8) for row in range(8)}
    assert len(found) == 8**3
    assert derived("row", 1, 23) != derived("row", 12, 3) != derived("step", 12, 3)


def test_derived_numbers_are_stable() -> None:
    """A checkpoint goes on with the numbers that it began with."""
    assert derived("row", 0, 0, 0) >> 1 == 1_267_123_373_154_733_616
    assert generator("order", 0, 0).permutation(6).tolist() == generator("order", 0, 0).permutation(6).tolist()
    assert all(0 <= uniform("step", 0, step) < 1 for step in range(100))
