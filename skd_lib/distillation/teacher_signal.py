"""What the teacher says at the positions of a response, whole or in part; the loss does not care which.

A dense signal is the teacher's final hidden states, and its head turns them into logits when they are needed. A sparse
signal is the log-probabilities of its k most likely tokens and of one bucket with all others: a coarser distribution
over k + 1 events. The student's distribution is coarsened in the same way, so that what is computed from both remains a
divergence, 0 where the two agree, and at most the dense one (data processing inequality; `adaptive_kl`, whose two KLs
are weighted by the distributions themselves, is not bound by it). With k = V there is no bucket, and both are equal.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Self

import torch
from torch import Tensor
from transformers import PreTrainedModel

from skd_lib.distillation.divergences import log_probs
from skd_lib.errors import SkdError
from skd_lib.models.heads import lm_logits


class Comparison(NamedTuple):
    """Teacher and student over the same events.

    Attributes:
        log_p_NE: The teacher's log-probabilities, without gradient.
        log_q_NE: The student's.
        vocabulary: Tokens that are compared: the common rows of both models.
        ids_NK: The tokens that the first K events stand for; None where event e is token e.
    """

    log_p_NE: Tensor
    log_q_NE: Tensor
    vocabulary: int
    ids_NK: Tensor | None = None

    def teachers_likeliest(self, count: int) -> Tensor:
        """(N, count) ids of the teacher's most likely tokens, or all there are."""
        if self.ids_NK is None:
            return self.log_p_NE.topk(min(count, self.vocabulary)).indices
        return self.ids_NK[:, :count]  # in descending order


class TeacherSignal(ABC):
    """What the teacher says at N positions."""

    @abstractmethod
    def __len__(self) -> int:
        """Number of positions."""

    @abstractmethod
    def compare(self, student_logits_NV: Tensor, temperature: float) -> Comparison:
        """Teacher and student over common events, in fp32, with a graph to the student's logits.

        Args:
            student_logits_NV: Raw logits at all N positions.
            temperature: Divides both models' logits.

        Raises:
            SkdError: the signal was made for another temperature.
        """

    @abstractmethod
    def split(self, sizes: int | Sequence[int]) -> list[Self]:
        """Consecutive parts: of `sizes` positions each, or of so many one after the other."""

    @abstractmethod
    def to(self, device: torch.device | str) -> Self:
        """The same on another device."""

    @classmethod
    @abstractmethod
    def concatenate(cls, parts: Sequence[Self]) -> Self:
        """The signals one after the other; all are of one kind."""


@dataclass(frozen=True)
class DenseSignal(TeacherSignal):
    """The teacher's final hidden states.

    Attributes:
        states_NH: What the teacher's head reads.
        teacher: Whose head reads it.
    """

    states_NH: Tensor
    teacher: PreTrainedModel

    def __len__(self) -> int:
        return len(self.states_NH)

    def compare(self, student_logits_NV: Tensor, temperature: float) -> Comparison:
        """See `TeacherSignal.compare`."""
        with torch.no_grad():
            teacher_logits_NV = lm_logits(self.teacher, self.states_NH)
        log_p_NV, log_q_NV = log_probs(teacher_logits_NV, student_logits_NV, temperature)
        return Comparison(log_p_NV, log_q_NV, log_p_NV.shape[-1])

    def split(self, sizes: int | Sequence[int]) -> list[Self]:
        """See `TeacherSignal.split`."""
        parts = torch.split(self.states_NH, sizes if isinstance(sizes, int) else list(sizes))
        return [replace(self, states_NH=part_NH) for part_NH in parts]

    def to(self, device: torch.device | str) -> Self:
        """See `TeacherSignal.to`."""
        return replace(self, states_NH=self.states_NH.to(device))

    @classmethod
    def concatenate(cls, parts: Sequence[Self]) -> Self:
        """See `TeacherSignal.concatenate`."""
        return replace(parts[0], states_NH=torch.cat([part.states_NH for part in parts]))


@dataclass(frozen=True)
class SparseSignal(TeacherSignal):
    """The teacher's most likely tokens and what it gives to all the others together.

    Attributes:
        log_p_NE: fp32 log-probabilities of the K most likely tokens in descending order, then of all other tokens
            together: E = K + 1. With K = V there are no others, and E = K.
        ids_NK: The K tokens.
        temperature: The teacher's logits were divided by it.
        vocabulary: Tokens that have a probability: the common rows of both models.
    """

    log_p_NE: Tensor
    ids_NK: Tensor
    temperature: float
    vocabulary: int

    @classmethod
    def of_logits(cls, teacher_logits_NV: Tensor, k: int, *, temperature: float, vocabulary: int) -> Self:
        """Keep the `k` most likely of the first `vocabulary` tokens."""
        ids_NK = teacher_logits_NV[..., :vocabulary].topk(min(k, vocabulary)).indices
        log_p_NE = _coarse_log_probs(teacher_logits_NV, ids_NK, temperature, vocabulary)
        return cls(log_p_NE, ids_NK.int(), temperature, vocabulary)

    def __len__(self) -> int:
        return len(self.log_p_NE)

    def compare(self, student_logits_NV: Tensor, temperature: float) -> Comparison:
        """See `TeacherSignal.compare`."""
        if temperature != self.temperature:
            raise SkdError(
                f"the stored teacher signal is of temperature {self.temperature:g}, the loss wants {temperature:g}",
                where="distill.temperature",
                hint="the mass of the tokens that were not stored is known at one temperature only: store it again",
            )
        if student_logits_NV.shape[-1] < self.vocabulary:
            raise SkdError(
                f"the stored teacher signal is of {self.vocabulary} tokens, the student's head has "
                f"{student_logits_NV.shape[-1]}",
                hint="store it again for this student",
            )
        ids_NK = self.ids_NK.long()
        log_q_NE = _coarse_log_probs(student_logits_NV, ids_NK, temperature, self.vocabulary)
        return Comparison(self.log_p_NE, log_q_NE, self.vocabulary, ids_NK)

    def split(self, sizes: int | Sequence[int]) -> list[Self]:
        """See `TeacherSignal.split`."""
        lengths = sizes if isinstance(sizes, int) else list(sizes)
        parts = zip(torch.split(self.log_p_NE, lengths), torch.split(self.ids_NK, lengths), strict=True)
        return [replace(self, log_p_NE=log_p_NE, ids_NK=ids_NK) for log_p_NE, ids_NK in parts]

    def to(self, device: torch.device | str) -> Self:
        """See `TeacherSignal.to`."""
        return replace(self, log_p_NE=self.log_p_NE.to(device), ids_NK=self.ids_NK.to(device))

    @classmethod
    def concatenate(cls, parts: Sequence[Self]) -> Self:
        """See `TeacherSignal.concatenate`."""
        return replace(
            parts[0],
            log_p_NE=torch.cat([part.log_p_NE for part in parts]),
            ids_NK=torch.cat([part.ids_NK for part in parts]),
        )


def _coarse_log_probs(logits_NV: Tensor, ids_NK: Tensor, temperature: float, vocabulary: int) -> Tensor:
    """Log-probabilities of the tokens `ids_NK` and, where there are others, of all others together."""
    dtype = torch.promote_types(logits_NV.dtype, torch.float32)
    rows_NV = logits_NV[..., :vocabulary].to(dtype) / temperature
    total_N1 = rows_NV.logsumexp(-1, keepdim=True)
    chosen_NK = rows_NV.gather(-1, ids_NK)
    if ids_NK.shape[-1] == vocabulary:
        return chosen_NK - total_N1
    # Summed over the others themselves: 1 - sum of the chosen would be rounding where the chosen have nearly all.
    # Least floats instead of -inf, which would have no gradient where all others are -inf.
    least = torch.finfo(dtype).min
    others_N1 = rows_NV.scatter(-1, ids_NK, least).clamp_min(least).logsumexp(-1, keepdim=True)
    others_N1 = others_N1.masked_fill(others_N1 <= least, -torch.inf)
    return torch.cat([chosen_NK, others_N1], dim=-1) - total_N1
