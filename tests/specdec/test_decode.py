"""The blocks of a response, read off its tokens' sources, and the time at which each token was there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skd_lib.config import SamplingParams, SpecdecConfig
from skd_lib.errors import SkdError
from skd_lib.sampling.acceptance import lossless, teacher_only
from skd_lib.sampling.engine import STUDENT, TEACHER, Sampler
from skd_lib.specdec.benchmark import Plan
from skd_lib.specdec.decode import DecodedBlock, count_by_position, decode, split_blocks
from tests.conftest import TinyModel
from tests.specdec.conftest import FakeClock
from tests.specdec.test_benchmark import EOS, NO_EOS, prompts

whole_blocks = st.lists(st.integers(0, 8).map(lambda accepted: DecodedBlock(accepted, True)), max_size=8)
last_blocks = st.integers(0, 8).map(lambda accepted: [DecodedBlock(accepted, False)] if accepted else [])


@given(whole_blocks, last_blocks)
def test_blocks_are_found_again(blocks: list[DecodedBlock], last: list[DecodedBlock]) -> None:
    sources = [
        source
        for block in [*blocks, *last]
        for source in [*[STUDENT] * block.accepted, *([TEACHER] if block.by_teacher else [])]
    ]
    assert split_blocks(sources) == [*blocks, *last]
    assert sum(block.tokens for block in split_blocks(sources)) == len(sources)


def test_counts_by_position() -> None:
    # Rejected at once; after one; whole with a bonus; ended by EOS as second draft: nothing rejected there.
    blocks = [DecodedBlock(0, True), DecodedBlock(1, True), DecodedBlock(3, True), DecodedBlock(2, False)]
    assert count_by_position(blocks, gamma=3) == ([4, 3, 1], [3, 2, 1])
    assert count_by_position([DecodedBlock(0, True)] * 3, gamma=4) == ([3, 0, 0, 0], [0, 0, 0, 0])


def test_counts_are_those_of_the_sampler(tiny_model: TinyModel) -> None:
    for student, rule in ((tiny_model(seed=1), lossless()), (None, teacher_only())):
        sampler = Sampler(
            student=student,
            teacher=tiny_model(),
            rule=rule,
            eos_ids=EOS,
            pad_id=0,
            max_new_tokens=18,
            gamma=4,
            student_params=SamplingParams(temperature=2.0),
            teacher_params=SamplingParams(temperature=2.0),
            batch_size=5,
        )
        found = decode(sampler, prompts(), range(5), batch_size=5)
        blocks = [block for row in found.blocks for block in row]
        tested, accepted = count_by_position(blocks, gamma=4)
        counts = found.statistics
        assert (len(blocks), sum(block.tokens for block in blocks)) == (counts.teacher_calls, counts.tokens)
        if student is not None:
            assert 0 < counts.accepted < counts.tested
            assert (sum(tested), sum(accepted)) == (counts.tested, counts.accepted)


def test_a_batch_that_was_begun_again_is_refused(tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that ran out of memory are sampled in further rounds, whose times are not those of one batch."""
    sample = Sampler.sample

    def one_by_one(self: Sampler, prompts: Any, seeds: Any, on_round: Callable[[], None]) -> Any:
        sample(self, prompts[:1], seeds[:1], on_round=on_round)
        return sample(self, prompts, seeds, on_round=on_round)

    plan = Plan(tiny_model(), {}, prompts(2), NO_EOS, 0, 4, SpecdecConfig())
    sampler = plan.alone(plan.teacher, 0.0, 2)
    assert len(decode(sampler, plan.prompts, [0, 1], 2).responses) == 2
    monkeypatch.setattr(Sampler, "sample", one_by_one)
    with pytest.raises(SkdError, match="a batch of 2 rows does not fit"):
        decode(sampler, plan.prompts, [0, 1], 2)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_latencies(tiny_model: TinyModel, clock: FakeClock, batch_size: int) -> None:
    """A teacher that takes 1 s for a forward, and a draft that is always right and takes 0.1 s."""
    teacher, draft = clock.charge(tiny_model(), 1.0), clock.charge(tiny_model(), 0.1)
    plan = Plan(teacher, {"draft": draft}, prompts(4), NO_EOS, 0, 9, SpecdecConfig())
    seeds = list(range(4))
    alone = decode(plan.alone(plan.teacher, 0.0, batch_size), plan.prompts, seeds, batch_size)
    assert alone.first_token == pytest.approx([2.0] * 4)  # the prompt, and the first round
    assert alone.per_token == pytest.approx([1.0] * 4 * 8)  # of 9 tokens each, all but the first
    assert alone.seconds == pytest.approx(10.0 * 4 / batch_size)

    drafted = decode(plan.sampler(draft, 2, 0.0, batch_size), plan.prompts, seeds, batch_size)
    assert drafted.responses == alone.responses
    assert [[block.tokens for block in row] for row in drafted.blocks] == [[3, 3, 3]] * 4
    assert drafted.first_token == pytest.approx([1.1 + 1.2] * 4)
    assert drafted.per_token == pytest.approx([0.4] * 4 * 6)  # the first round's tokens were there with the first
    assert drafted.seconds == pytest.approx((1.1 + 3 * 1.2) * 4 / batch_size)
