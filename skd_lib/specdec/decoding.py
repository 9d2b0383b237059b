"""One timed pass over the prompts, and when each of its tokens was there.

Rows are decoded in batches that start together, as requests that arrive together are. The sampler asks `stop` about
every row that goes on, once a round: the moments of these calls, and the blocks of each response, tell when each round
ended, with nothing added to the sampler.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from skd_lib.errors import SkdError
from skd_lib.sampling.engine import Sampler, Samples
from skd_lib.specdec.blocks import Block, blocks_of


@dataclass
class Clock:
    """A `stop` that stops nothing and notes when it was asked."""

    moments: list[float] = field(default_factory=list)

    def __call__(self, response: list[int]) -> bool:  # noqa: ARG002 - the sampler's signature
        """Note the time."""
        self.moments.append(time.perf_counter())
        return False


@dataclass(frozen=True)
class Decoder:
    """A sampler and the clock that is its `stop`."""

    sampler: Sampler
    clock: Clock


@dataclass
class Pass:
    """What one pass yielded; times in seconds.

    Attributes:
        seconds: Of all batches, prefill included.
        responses: Token ids, in the order of the prompts.
        blocks: Of each response.
        first_token: From each batch's start to the end of the round that wrote a row's first token; one a row.
        per_token: For each token after the first round, its share of the time that its block took.
    """

    seconds: float = 0.0
    responses: list[list[int]] = field(default_factory=list)
    blocks: list[list[Block]] = field(default_factory=list)
    first_token: list[float] = field(default_factory=list)
    per_token: list[float] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """Response tokens."""
        return sum(map(len, self.responses))

    @property
    def seconds_per_token(self) -> float:
        """Over the whole pass."""
        return self.seconds / self.tokens


def decode(decoder: Decoder, prompts: Sequence[list[int]], seeds: Sequence[int], batch_size: int) -> Pass:
    """Decode the prompts, `batch_size` at a time.

    Raises:
        SkdError: a batch does not fit into the device's memory.
    """
    result = Pass()
    for start in range(0, len(prompts), batch_size):
        batch = slice(start, start + batch_size)
        decoder.clock.moments.clear()
        started = time.perf_counter()
        samples = decoder.sampler.sample(prompts[batch], seeds[batch])
        if samples.tokens_BT.is_cuda:
            torch.cuda.synchronize(samples.tokens_BT.device)
        ended = time.perf_counter()
        blocks = blocks_of(samples)
        moments = [started, *round_ends(decoder.clock.moments, [len(row) for row in blocks], ended)]
        result.seconds += ended - started
        result.responses += _responses(samples)
        result.blocks += blocks
        result.first_token += [moments[1] - started] * len(blocks)
        result.per_token += [
            (moments[number + 1] - moments[number]) / block.tokens
            for row in blocks
            for number, block in enumerate(row)
            for _ in range(block.tokens if number else 0)
        ]
    return result


def round_ends(asked: Sequence[float], rounds_by_row: Sequence[int], ended: float) -> list[float]:
    """When each round of a batch ended.

    Args:
        asked: When `stop` was asked, in order: in each round once a row that goes on.
        rounds_by_row: How many rounds each row took part in.
        ended: When the batch ended, and with it the last round, in which no row goes on.

    Raises:
        SkdError: the sampler asked more or less often, which it does where it ran out of memory and began again.
    """
    ends, place = [], 0
    for number in range(1, max(rounds_by_row)):
        if place < len(asked):
            ends.append(asked[place])
        place += sum(rounds > number for rounds in rounds_by_row)
    if place != len(asked):
        raise SkdError(
            f"a batch of {len(rounds_by_row)} rows does not fit into the device's memory",
            where="speculative decoding",
            hint="lower specdec.batch_sizes, task.max_prompt_tokens or task.max_new_tokens",
        )
    return [*ends, ended]


def _responses(samples: Samples) -> list[list[int]]:
    lengths = samples.mask_BT.sum(-1).tolist()
    return [row[:length] for row, length in zip(samples.tokens_BT.tolist(), lengths, strict=True)]
