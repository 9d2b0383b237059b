"""What the sampler keeps while it runs: rows in flight, rows that wait, and what has been written so far."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from skd_lib.errors import SkdError
from skd_lib.sampling.cache import RowCache
from skd_lib.sampling.samples import SamplingStatistics

log = logging.getLogger(__name__)


@dataclass
class Rows:
    """The rows being sampled. A row knows `length` tokens (prompt and response); both caches hold all but the last."""

    index_B: Tensor  # which prompt
    length_B: Tensor
    prompt_length_B: Tensor
    last_two_B2: Tensor  # the last two known tokens; the first is a filler after a prompt of one token
    student_cache: RowCache | None
    teacher_cache: RowCache | None
    longest: int  # length_B.max(), known without asking the device

    def select(self, keep: Tensor) -> None:
        """Drop the other rows."""
        self.index_B, self.length_B = self.index_B[keep], self.length_B[keep]
        self.prompt_length_B, self.last_two_B2 = self.prompt_length_B[keep], self.last_two_B2[keep]
        for cache in (self.student_cache, self.teacher_cache):
            if cache is not None:
                cache.select(keep)

    def extend(self, other: Rows) -> None:
        """Add rows that were just prefilled."""
        self.index_B = torch.cat([self.index_B, other.index_B])
        self.length_B = torch.cat([self.length_B, other.length_B])
        self.prompt_length_B = torch.cat([self.prompt_length_B, other.prompt_length_B])
        self.last_two_B2 = torch.cat([self.last_two_B2, other.last_two_B2])
        for mine, theirs in ((self.student_cache, other.student_cache), (self.teacher_cache, other.teacher_cache)):
            if mine is not None and theirs is not None:
                mine.extend(theirs)
        self.longest = max(self.longest, other.longest)


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
