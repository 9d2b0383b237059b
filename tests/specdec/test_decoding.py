"""When each token was there: read off the moments at which the sampler asked about its rows."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skd_lib.config import SpecdecConfig
from skd_lib.errors import SkdError
from skd_lib.specdec.decoding import decode, round_ends
from skd_lib.specdec.plan import Plan
from tests.conftest import TinyModel
from tests.specdec.conftest import FakeClock
from tests.specdec.test_benchmark import NO_EOS, prompts


@given(st.lists(st.integers(1, 6), min_size=1, max_size=5))
def test_rounds_are_told_apart(rounds_by_row: list[int]) -> None:
    """A batch as the sampler runs it: round `n` ends at `n`, and asks about every row that goes on."""
    asked = [
        number + index / 100
        for number in range(1, max(rounds_by_row) + 1)
        for index in range(sum(rounds > number for rounds in rounds_by_row))
    ]
    last = float(max(rounds_by_row))
    assert round_ends(asked, rounds_by_row, last) == [float(number) for number in range(1, int(last) + 1)]


@pytest.mark.parametrize("asked", [[1.0], [1.0, 2.0, 3.0]])
def test_a_batch_that_was_begun_again_is_refused(asked: list[float]) -> None:
    with pytest.raises(SkdError, match="a batch of 1 rows does not fit"):
        round_ends(asked, [3], 4.0)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_latencies(tiny_model: TinyModel, clock: FakeClock, batch_size: int) -> None:
    """A teacher that takes 1 s for a forward, and a draft that is always right and takes 0.1 s."""
    teacher, draft = clock.charge(tiny_model(), 1.0), clock.charge(tiny_model(), 0.1)
    plan = Plan(teacher, {"draft": draft}, prompts(4), NO_EOS, 0, 9, SpecdecConfig())
    seeds = list(range(4))
    alone = decode(plan.decoder(None, 1, 0.0, batch_size), plan.prompts, seeds, batch_size)
    assert alone.first_token == pytest.approx([2.0] * 4)  # the prompt, and the first round
    assert alone.per_token == pytest.approx([1.0] * 4 * 8)  # of 9 tokens each, all but the first
    assert alone.seconds == pytest.approx(10.0 * 4 / batch_size)

    drafted = decode(plan.decoder(draft, 2, 0.0, batch_size), plan.prompts, seeds, batch_size)
    assert drafted.responses == alone.responses
    assert [[block.tokens for block in row] for row in drafted.blocks] == [[3, 3, 3]] * 4
    assert drafted.first_token == pytest.approx([1.1 + 1.2] * 4)
    assert drafted.per_token == pytest.approx([0.4] * 4 * 6)  # the first round's tokens were there with the first
    assert drafted.seconds == pytest.approx((1.1 + 3 * 1.2) * 4 / batch_size)
