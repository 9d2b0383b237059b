"""What the sampler keeps while it runs: rows in flight, rows that wait, and what has been written so far."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from skd_lib.errors import SkdError
from skd_lib.sampling.cache import RowCache, TokenCache
from skd_lib.sampling.samples import SamplingStatistics

log = logging.getLogger(__name__)


@dataclass
class Rows:
    """The rows being sampled. A row knows `length` tokens (prompt and response); both caches hold all but the last."""

    index_B: Tensor  # which prompt
    length_B: Tensor
    prompt_length_B: Tensor
    last_two_B2: Tensor  # the last two known tokens; the first is a filler after a prompt of one token
    student_cache: RowCache | TokenCache | None
    teacher_cache: RowCache | TokenCache | None
    longest: int  # length_B.max(), known without asking the device

    def advance(self, length_B: Tensor, last_two_B2: Tensor, longest: int) -> None:
        """Know the tokens that a round has added."""
        self.length_B.copy_(length_B)
        self.last_two_B2.copy_(last_two_B2)
        self.longest = longest

    def select(self, keep: Tensor) -> Rows:
        """Only these rows."""
        for name in CACHES:
            if (cache := getattr(self, name)) is not None:
                cache.select(keep)
        kept: dict[str, Any] = {name: getattr(self, name)[keep] for name in PER_ROW}
        return replace(self, **kept)

    def extend(self, other: Rows) -> Rows:
        """These rows, and others that were just prefilled."""
        for name in CACHES:
            if (cache := getattr(self, name)) is not None:
                cache.extend(getattr(other, name))
        both: dict[str, Any] = {name: torch.cat([getattr(self, name), getattr(other, name)]) for name in PER_ROW}
        return replace(self, **both, longest=max(self.longest, other.longest))


PER_ROW = ("index_B", "length_B", "prompt_length_B", "last_two_B2")
"""The tensors of `Rows`."""
CACHES = ("student_cache", "teacher_cache")


@dataclass(frozen=True)
class Task:
    """A row that waits for its place: a prompt, and the response so far where it had to give its place up."""

    index: int
    prompt: list[int]
    response: list[int]


@dataclass
class Output:
    """Buffers for all prompts' responses, wide enough for a block that runs over the length limit."""

    tokens_NT: Tensor
    mask_NT: Tensor
    source_NT: Tensor
    proposals_NT: Tensor
    truncated_N: Tensor
    running_N: Tensor
    uniforms_NTC: Tensor
    states_NTH: Tensor | None
    counts: SamplingStatistics

    def unfinished(self, prompts: Sequence[list[int]]) -> list[Task]:
        """The rows that still run, with the tokens they have."""
        running = self.running_N.nonzero().squeeze(-1).tolist()
        return [Task(row, prompts[row], self.tokens_NT[row][self.mask_NT[row]].tolist()) for row in running]


@dataclass
class Room:
    """What the device's memory was seen to hold: the one thing a sampler learns."""

    slots: int | None = None

    def shrink(self, slots: int, error: torch.OutOfMemoryError) -> None:
        """Remember that so many rows were too many."""
        if slots == 1:
            hint = "lower max_prompt_tokens or max_new_tokens, or use smaller models"
            raise SkdError("not even one row fits into the device's memory", where="sampling", hint=hint) from error
        self.slots = slots // 2
        log.warning("out of memory while sampling %d rows at a time: going on with %d", slots, self.slots)
