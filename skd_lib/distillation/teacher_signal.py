"""The teacher's signal at the positions of a response, whole or in part; the loss treats both alike.

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
from typing import ClassVar, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from skd_lib.errors import SkdError
from skd_lib.models.heads import lm_logits


class SignalPair(NamedTuple):
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

    def teacher_top(self, count: int) -> Tensor:
        """Return (N, count) ids of the teacher's most likely tokens, or of all there are."""
        if self.ids_NK is None:
            return self.log_p_NE.topk(min(count, self.vocabulary)).indices
        return self.ids_NK[:, :count]  # in descending order


@dataclass(frozen=True)
class TeacherSignal(ABC):
    """The teacher's signal at N positions: tensors with a row for each, and what they have in common."""

    tensors: ClassVar[tuple[str, ...]]

    @abstractmethod
    def compare(self, student_logits_NV: Tensor, temperature: float) -> SignalPair:
        """Compare teacher and student over common events, in fp32, with a graph to the student's logits."""

    def __len__(self) -> int:
        return len(getattr(self, self.tensors[0]))

    def split(self, sizes: int | list[int]) -> list[Self]:
        """Split into consecutive parts: of `sizes` positions each, or of the sizes of a list."""
        return [self._with(part) for part in zip(*(torch.split(x, sizes) for x in self._rows()), strict=True)]

    def to(self, device: torch.device | str) -> Self:
        """Move to a device."""
        return self._with([x.to(device) for x in self._rows()])

    @classmethod
    def concatenate(cls, parts: Sequence[Self]) -> Self:
        """Concatenate signals, all of one kind."""
        return parts[0]._with([torch.cat(rows) for rows in zip(*(part._rows() for part in parts), strict=True)])

    def _rows(self) -> list[Tensor]:
        return [getattr(self, name) for name in self.tensors]

    def _with(self, rows: Sequence[Tensor]) -> Self:
        return replace(self, **dict(zip(self.tensors, rows, strict=True)))


@dataclass(frozen=True)
class DenseSignal(TeacherSignal):
    """The teacher's final hidden states.

    Attributes:
        states_NH: The states, as the teacher's head reads them.
        teacher: The model with that head.
    """

    states_NH: Tensor
    teacher: PreTrainedModel
    tensors = ("states_NH",)

    def compare(self, student_logits_NV: Tensor, temperature: float) -> SignalPair:
        """Compare over the tokens of the common rows, see `TeacherSignal.compare`."""
        with torch.no_grad():
            teacher_logits_NV = lm_logits(self.teacher, self.states_NH)
        log_p_NV, log_q_NV = log_probs(teacher_logits_NV, student_logits_NV, temperature)
        return SignalPair(log_p_NV, log_q_NV, log_p_NV.shape[-1])


@dataclass(frozen=True)
class SparseSignal(TeacherSignal):
    """The probabilities of the teacher's most likely tokens, and of all the others together.

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
    tensors = ("log_p_NE", "ids_NK")

    @classmethod
    def of_logits(cls, teacher_logits_NV: Tensor, k: int, *, temperature: float, vocabulary: int) -> Self:
        """Keep the `k` most likely of the first `vocabulary` tokens."""
        ids_NK = teacher_logits_NV[..., :vocabulary].topk(min(k, vocabulary)).indices
        log_p_NE = _coarse_log_probs(teacher_logits_NV, ids_NK, temperature, vocabulary)
        return cls(log_p_NE, ids_NK.int(), temperature, vocabulary)

    def compare(self, student_logits_NV: Tensor, temperature: float) -> SignalPair:
        """Compare over K + 1 events, see `TeacherSignal.compare`."""
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
        return SignalPair(self.log_p_NE, log_q_NE, self.vocabulary, ids_NK)


def log_probs(teacher_logits_NV: Tensor, student_logits_NV: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Return log-probabilities of teacher and student over their common rows, in fp32 (float64 if both inputs are).

    Padded vocabularies may differ in size: the ids that one of them lacks get probability 0. Both logits are divided by
    the temperature, without a factor for its square.
    """
    rows = min(teacher_logits_NV.shape[-1], student_logits_NV.shape[-1])
    precise = {teacher_logits_NV.dtype, student_logits_NV.dtype} == {torch.float64}
    dtype = torch.float64 if precise else torch.float32
    log_p_NV, log_q_NV = (
        F.log_softmax(logits_NV[..., :rows].to(dtype) / temperature, dim=-1)
        for logits_NV in (teacher_logits_NV, student_logits_NV)
    )
    return log_p_NV, log_q_NV


def _coarse_log_probs(logits_NV: Tensor, ids_NK: Tensor, temperature: float, vocabulary: int) -> Tensor:
    """Return log-probabilities of the tokens `ids_NK` and, where there are others, of all others together."""
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
