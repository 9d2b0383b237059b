"""Decode the prompts once against the clock: the blocks of each response, and the time at which each token is there.

Rows are decoded in batches that start together, as requests that arrive together are.

With `lossless` every block ends in one token of the teacher (its replacement of the first rejected draft, or its bonus
after a whole accepted block), unless the response ends inside the block. So the sources of a response's tokens give its
blocks, and the block with number n is that of the batch's round n.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch

from skd_lib.errors import SkdError
from skd_lib.sampling.engine import TEACHER, Sampler, SamplingStatistics


class DecodedBlock(NamedTuple):
    """One teacher call for one row: the drafted tokens that stand, and whether the teacher's own token follows them."""

    accepted: int
    by_teacher: bool

    @property
    def tokens(self) -> int:
        """Response tokens of the block."""
        return self.accepted + self.by_teacher


@dataclass
class Pass:
    """One decoding of all prompts; times in seconds.

    Attributes:
        seconds: Of all batches, prefill included.
        responses: Token ids, in the order of the prompts.
        blocks: Of each response.
        first_token: Of each row: from its batch's start to the end of the round that wrote its first token.
        per_token: Of each token after the first round: its share of the time that its block took.
        statistics: The sampler's counts.
    """

    seconds: float = 0.0
    responses: list[list[int]] = field(default_factory=list)
    blocks: list[list[DecodedBlock]] = field(default_factory=list)
    first_token: list[float] = field(default_factory=list)
    per_token: list[float] = field(default_factory=list)
    statistics: SamplingStatistics = field(default_factory=SamplingStatistics)

    @property
    def seconds_per_token(self) -> float:
        """Seconds for each response token."""
        return self.seconds / self.statistics.tokens


def decode(
    sampler: Sampler,
    prompts: Sequence[list[int]],
    seeds: Sequence[int],
    batch_size: int,
    on_batch: Callable[[int], None] | None = None,
) -> Pass:
    """Decode the prompts, `batch_size` at a time; `on_batch` is told of each batch's number of responses.

    Raises:
        SkdError: a batch does not fit into the device's memory.
    """
    result = Pass()
    for start in range(0, len(prompts), batch_size):
        batch = slice(start, start + batch_size)
        moments = [time.perf_counter()]
        samples = sampler.sample(prompts[batch], seeds[batch], on_round=partial(_note_time, moments))
        if samples.tokens_BT.is_cuda:
            torch.cuda.synchronize(samples.tokens_BT.device)
        moments[-1] = time.perf_counter()
        responses = samples.responses()
        rows = zip(samples.source_BT.tolist(), responses, strict=True)
        blocks = [split_blocks(sources[: len(response)]) for sources, response in rows]
        if len(moments) - 1 != max(map(len, blocks)):  # rows that ran out of memory are sampled in further rounds
            raise SkdError(
                f"a batch of {len(blocks)} rows does not fit into the device's memory",
                where="speculative decoding",
                hint="lower specdec.batch_sizes, task.max_prompt_tokens or task.max_new_tokens",
            )
        result.seconds += moments[-1] - moments[0]
        result.responses += responses
        result.blocks += blocks
        result.first_token += [moments[1] - moments[0]] * len(blocks)
        result.per_token += [
            (moments[number + 1] - moments[number]) / block.tokens
            for row in blocks
            for number, block in enumerate(row)
            for _ in range(block.tokens if number else 0)
        ]
        result.statistics += samples.statistics
        if on_batch is not None:
            on_batch(len(blocks))
    return result


def _note_time(moments: list[float]) -> None:
    moments.append(time.perf_counter())


def split_blocks(sources: Sequence[int]) -> list[DecodedBlock]:
    """Split a response into its blocks, by its tokens' sources (`STUDENT` or `TEACHER`)."""
    blocks, accepted = [], 0
    for source in sources:
        if source == TEACHER:
            blocks.append(DecodedBlock(accepted, True))
            accepted = 0
        else:
            accepted += 1
    return [*blocks, DecodedBlock(accepted, False)] if accepted else blocks


def count_by_position(blocks: Iterable[DecodedBlock], gamma: int) -> tuple[list[int], list[int]]:
    """Count, for each position of blocks of `gamma` drafted tokens, the drafts that were tested and those accepted.

    A draft is tested where all before it in its block were accepted.
    """
    tested, accepted = [0] * gamma, [0] * gamma
    for block in blocks:
        for position in range(block.accepted):
            tested[position] += 1
            accepted[position] += 1
        if block.by_teacher and block.accepted < gamma:
            tested[block.accepted] += 1
    return tested, accepted
