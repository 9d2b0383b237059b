"""What a response's sources tell about its blocks."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from skd_lib.config import SamplingParams
from skd_lib.sampling.acceptance import lossless, nothing
from skd_lib.sampling.engine import STUDENT, TEACHER, Sampler
from skd_lib.specdec.blocks import Acceptance, Block, blocks_of, split_blocks
from tests.conftest import TinyModel
from tests.specdec.test_benchmark import EOS, prompts

whole_blocks = st.lists(st.integers(0, 8).map(lambda accepted: Block(accepted, True)), max_size=8)
last_blocks = st.integers(0, 8).map(lambda accepted: [Block(accepted, False)] if accepted else [])


@given(whole_blocks, last_blocks)
def test_blocks_are_found_again(blocks: list[Block], last: list[Block]) -> None:
    sources = [
        source
        for block in [*blocks, *last]
        for source in [*[STUDENT] * block.accepted, *([TEACHER] if block.by_teacher else [])]
    ]
    assert split_blocks(sources) == [*blocks, *last]
    assert sum(block.tokens for block in split_blocks(sources)) == len(sources)


def test_counts_by_position() -> None:
    # Rejected at once; after one; whole with a bonus; ended by EOS as second draft: nothing rejected there.
    blocks = [Block(0, True), Block(1, True), Block(3, True), Block(2, False)]
    counts = Acceptance.count(blocks, gamma=3)
    assert counts.tested == (4, 3, 1)
    assert counts.accepted == (3, 2, 1)
    assert counts.by_position == [3 / 4, 2 / 3, 1]
    assert counts.rate == 6 / 8
    assert counts.tokens_per_block == 9 / 4


def test_a_position_that_was_never_reached_has_no_rate() -> None:
    assert Acceptance.count([Block(0, True)] * 3, gamma=4).by_position == [0.0]


def test_counts_are_those_of_the_sampler(tiny_model: TinyModel) -> None:
    for student, rule in ((tiny_model(seed=1), lossless()), (None, nothing())):
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
            batch_size=2,
        )
        samples = sampler.sample(prompts(), range(5))
        counts = Acceptance.count((block for row in blocks_of(samples) for block in row), gamma=4)
        told = samples.statistics
        assert (counts.blocks, counts.tokens) == (told.teacher_calls, told.tokens)
        if student is not None:
            assert 0 < told.accepted < told.tested
            assert (sum(counts.tested), sum(counts.accepted)) == (told.tested, told.accepted)
