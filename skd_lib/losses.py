"""The losses of a batch, computed on the head's side without ever holding all the logits.

From the final hidden states at response positions, in chunks whose logits are thrown away and computed again in the
backward pass: memory does not grow with sequence length times vocabulary. Reductions are in fp32; a head that scales or
caps its logits does so here too (`skd_lib.models.heads`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from skd_lib.divergences import Divergence
from skd_lib.models.heads import lm_logits, vocabulary_size
from skd_lib.teacher_signals import Comparison, DenseSignal, TeacherSignal

_CHUNK_ELEMENTS = 2**26
"""Logits a chunk may hold: 256 MiB in fp32."""


class LossSums(NamedTuple):
    """Sums over N response positions.

    Attributes:
        loss: With its graph; divide it by the response tokens of the optimiser step.
        entropies: In nats, detached: `student`, and `teacher` where there is one. Of a sparse teacher signal, over
            its events.
    """

    loss: Tensor
    entropies: dict[str, Tensor]


@dataclass(frozen=True)
class Selective:
    """Token weights of SelecTKD (arXiv 2510.24021): full where the teacher would let the student's choice stand.

    Attributes:
        top: A position counts in full if the student's likeliest token is among so many likeliest of the teacher's.
        otherwise: Its weight if not.
    """

    top: int = 5
    otherwise: float = 0.01

    def weights(self, compared: Comparison, student_logits_NV: Tensor) -> Tensor:
        """(N,) weights, without gradient."""
        choice_N1 = student_logits_NV.detach()[..., : compared.vocabulary].argmax(-1, keepdim=True)
        trusted_N = (compared.teachers_likeliest(self.top) == choice_N1).any(-1)
        return torch.where(trusted_N, 1.0, self.otherwise)


@dataclass(frozen=True)
class DistillationLoss:
    """What is summed over the response tokens of a rollout.

    Attributes:
        divergence: From the teacher, at every token.
        temperature: Divides both logits in the divergence; the entropies are those of the divided logits.
        squared: Multiply the divergence by the temperature's square (Hinton et al. 2015, arXiv 1503.02531), so that
            its gradient keeps its size.
        selective: Weights of the divergence's terms; None: all 1.
        replaced_weight: Weight of the cross-entropy added at tokens that the teacher wrote.
    """

    divergence: Divergence
    temperature: float = 1.0
    squared: bool = False
    selective: Selective | None = None
    replaced_weight: float = 0.0

    def __call__(
        self,
        student: PreTrainedModel,
        student_states_NH: Tensor,
        signal: TeacherSignal,
        targets_N: Tensor,
        by_teacher_N: Tensor,
        chunk: int | None = None,
    ) -> LossSums:
        """The sum over N response positions.

        Args:
            student: Its head makes the student's logits; gradients flow to the states and to the head.
            student_states_NH: Student states that predict the N response tokens.
            signal: What the teacher says at the same positions.
            targets_N: The response tokens.
            by_teacher_N: Which of them the teacher wrote.
            chunk: Positions whose logits are held at once; by default as many as fit into 256 MiB in fp32.

        Returns:
            Sums over the N positions; N = 0 gives 0 with a graph to every parameter involved.
        """
        models = [student, signal.teacher] if isinstance(signal, DenseSignal) else [student]
        size = chunk or _chunk_size(*models)
        tensors = (student_states_NH, targets_N, by_teacher_N)
        chunks = zip(*(torch.split(tensor, size) for tensor in tensors), signal.split(size), strict=True)
        return _sum_over_chunks(lambda *inputs: self._of_chunk(student, *inputs), list(chunks))

    def _of_chunk(
        self,
        student: PreTrainedModel,
        student_states_NH: Tensor,
        targets_N: Tensor,
        by_teacher_N: Tensor,
        signal: TeacherSignal,
    ) -> LossSums:
        logits_NV = lm_logits(student, student_states_NH)
        compared = signal.compare(logits_NV, self.temperature)
        loss_N = self.divergence.of_log_probs(compared.log_p_NE, compared.log_q_NE)
        if self.squared:
            loss_N = loss_N * self.temperature**2
        if self.selective is not None:
            loss_N = loss_N * self.selective.weights(compared, logits_NV)
        loss = loss_N.sum()
        if self.replaced_weight:
            replaced = F.cross_entropy(logits_NV[by_teacher_N].float(), targets_N[by_teacher_N], reduction="sum")
            loss = loss + self.replaced_weight * replaced
        entropies = {"student": _entropy_sum(compared.log_q_NE), "teacher": _entropy_sum(compared.log_p_NE)}
        return LossSums(loss, entropies)


def cross_entropy_sum(
    student: PreTrainedModel, student_states_NH: Tensor, targets_N: Tensor, chunk: int | None = None
) -> LossSums:
    """Sum of the cross-entropy over response positions, from final hidden states.

    Args:
        student: Its head makes the logits.
        student_states_NH: States that predict the N response tokens.
        targets_N: The response tokens.
        chunk: Positions whose logits are held at once; by default as many as fit into 256 MiB in fp32.

    Returns:
        Sums over the N positions; N = 0 gives 0 with a graph to every parameter involved.
    """

    def of_chunk(student_chunk_NH: Tensor, targets_chunk_N: Tensor) -> LossSums:
        logits_NV = lm_logits(student, student_chunk_NH)
        log_q_NV = F.log_softmax(logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32)), dim=-1)
        loss = -log_q_NV.gather(-1, targets_chunk_N.unsqueeze(-1)).sum()
        return LossSums(loss, {"student": _entropy_sum(log_q_NV)})

    size = chunk or _chunk_size(student)
    return _sum_over_chunks(
        of_chunk, list(zip(torch.split(student_states_NH, size), torch.split(targets_N, size), strict=True))
    )


def _chunk_size(*models: PreTrainedModel) -> int:
    return max(1, _CHUNK_ELEMENTS // max(vocabulary_size(model) for model in models))


def _entropy_sum(log_probs_NE: Tensor) -> Tensor:
    detached_NE = log_probs_NE.detach()
    return -(detached_NE.exp() * detached_NE).sum()


def _sum_over_chunks(of_chunk: Callable[..., LossSums], chunks: Sequence[tuple[Any, ...]]) -> LossSums:
    """Add up `of_chunk` over chunks of positions; with more than one, logits are recomputed in the backward pass."""
    if len(chunks) == 1:
        return of_chunk(*chunks[0])
    parts = [checkpoint(of_chunk, *chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks]
    entropies = {name: torch.stack([part.entropies[name] for part in parts]).sum() for name in parts[0].entropies}
    return LossSums(torch.stack([part.loss for part in parts]).sum(), entropies)
