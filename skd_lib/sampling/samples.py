"""The rows that are being sampled, and the samples that come out."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from skd_lib.errors import SkdError
from skd_lib.sampling.cache import RowCache, TokenCache

log = logging.getLogger(__name__)

STUDENT = 0
TEACHER = 1
"""Writer of a token: the student (an accepted draft), or the teacher (a replacement or a bonus)."""


@dataclass(frozen=True)
class SamplingStatistics:
    """Counts over a sampled batch; add them up over batches, then read the ratios.

    Attributes:
        sequences: Sampled responses.
        tokens: Response tokens, EOS included; always accepted + replaced + bonus.
        drafted: Tokens the student drafted, wasted ones included.
        accepted: Drafted tokens that stand.
        replaced: Tokens the teacher sampled in place of a rejected draft, or with no draft at all.
        bonus: Tokens the teacher added after a whole accepted block.
        tested: Drafted tokens up to and including each block's first rejection.
        teacher_calls: Teacher forwards, counted once a row.
        student_calls: Student forwards, counted once a row.
        teacher_positions: Token positions that went through the teacher's decoder, prefill included, padding left out.
            Work that is repeated after an out-of-memory error does not count.
        student_positions: The same of the student's.
        truncated: Responses that ended by the length limit.
    """

    sequences: int = 0
    tokens: int = 0
    drafted: int = 0
    accepted: int = 0
    replaced: int = 0
    bonus: int = 0
    tested: int = 0
    teacher_calls: int = 0
    student_calls: int = 0
    teacher_positions: int = 0
    student_positions: int = 0
    truncated: int = 0

    def __add__(self, other: SamplingStatistics) -> SamplingStatistics:
        return SamplingStatistics(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    @property
    def acceptance_rate(self) -> float:
        """Accepted / tested; 1 where nothing was tested."""
        return self.accepted / self.tested if self.tested else 1.0

    @property
    def rejection_rate(self) -> float:
        """1 - acceptance rate. Near 0, SKD has become on-policy distillation."""
        return 1.0 - self.acceptance_rate

    @property
    def replacements_per_sequence(self) -> float:
        """Mean number of teacher replacements in a response."""
        return self.replaced / max(self.sequences, 1)

    @property
    def tokens_per_teacher_call(self) -> float:
        """Block efficiency; 0 where the teacher was never asked."""
        return self.tokens / self.teacher_calls if self.teacher_calls else 0.0

    @property
    def truncated_fraction(self) -> float:
        """Share of responses that ended by the length limit."""
        return self.truncated / max(self.sequences, 1)


@dataclass(frozen=True)
class Samples:
    """Sampled responses, in the order of their prompts.

    Attributes:
        tokens_BT: Response token ids as sampled (never decoded and re-tokenised), right-padded.
        mask_BT: True on response tokens, EOS included.
        source_BT: `STUDENT` or `TEACHER`, int8.
        proposals_BT: The student's draft that a teacher's token replaced; -1 where there is none.
        truncated_B: True for rows that ended by the length limit; they have no EOS.
        teacher_states_BTH: The teacher's final hidden state from which it predicts each response token; None unless
            asked for.
        teacher_top: (B, T, K + 1) and (B, T, K): the teacher's log-probabilities of its K most likely tokens and of all
            others together, and these tokens, where an engine returns them in place of the states.
        statistics: Counts over the batch.
    """

    tokens_BT: Tensor
    mask_BT: Tensor
    source_BT: Tensor
    proposals_BT: Tensor
    truncated_B: Tensor
    teacher_states_BTH: Tensor | None
    statistics: SamplingStatistics
    teacher_top: tuple[Tensor, Tensor] | None = None

    @property
    def lengths(self) -> list[int]:
        """Response tokens of each row, EOS included."""
        lengths: list[int] = self.mask_BT.sum(1).tolist()
        return lengths

    def responses(self) -> list[list[int]]:
        """Return the token ids of each response, EOS included, without padding."""
        return [row[:length] for row, length in zip(self.tokens_BT.tolist(), self.lengths, strict=True)]


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
        """Add the tokens of a round."""
        self.length_B.copy_(length_B)
        self.last_two_B2.copy_(last_two_B2)
        self.longest = longest

    def select(self, keep: Tensor) -> Rows:
        """Keep only these rows."""
        for name in CACHES:
            if (cache := getattr(self, name)) is not None:
                cache.select(keep)
        kept: dict[str, Any] = {name: getattr(self, name)[keep] for name in PER_ROW}
        return replace(self, **kept)

    def extend(self, other: Rows) -> Rows:
        """Append rows that were just prefilled."""
        for name in CACHES:
            if (cache := getattr(self, name)) is not None:
                cache.extend(getattr(other, name))
        both: dict[str, Any] = {name: torch.cat([getattr(self, name), getattr(other, name)]) for name in PER_ROW}
        return replace(self, **both, longest=max(self.longest, other.longest))


PER_ROW = ("index_B", "length_B", "prompt_length_B", "last_two_B2")
"""The tensors of `Rows`."""
CACHES = ("student_cache", "teacher_cache")


@dataclass(frozen=True)
class QueuedRow:
    """A queued row: its prompt, and the tokens it had when it was evicted."""

    index: int
    prompt: list[int]
    response: list[int]


@dataclass
class ResponseBuffers:
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

    def unfinished(self, prompts: Sequence[list[int]]) -> list[QueuedRow]:
        """Return the rows that still run, with the tokens they have."""
        running = self.running_N.nonzero().squeeze(-1).tolist()
        return [QueuedRow(row, prompts[row], self.tokens_NT[row][self.mask_NT[row]].tolist()) for row in running]


@dataclass
class BatchLimit:
    """Largest batch that fits on the device, lowered after each out-of-memory error."""

    slots: int | None = None

    def shrink(self, slots: int, error: torch.OutOfMemoryError) -> None:
        """Halve the limit after `slots` rows did not fit."""
        if slots == 1:
            prompts = "shorten the prompts (`task.max_prompt_tokens` in a run's file)"
            hint = f"{prompts}, lower max_new_tokens, or use smaller models"
            raise SkdError("not even one row fits into the device's memory", where="sampling", hint=hint) from error
        self.slots = slots // 2
        log.warning("out of memory while sampling %d rows at a time: going on with %d", slots, self.slots)
