"""The losses of a batch, computed on the head's side without ever holding all the logits.

From the final hidden states at response positions, in chunks: the gradient of a chunk is taken as soon as its loss is
known, and its logits are thrown away. So memory does not grow with sequence length times vocabulary, and no logits are
computed twice (the idea of Liger's fused losses, arXiv 2410.10989). Reductions are in fp32; a head that scales or caps
its logits does so here too (`skd_lib.models.heads`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from skd_lib.config.distill import DistillConfig, SelectiveConfig
from skd_lib.distillation.batch import Rollout, response_states, teacher_signals
from skd_lib.distillation.divergences import DIVERGENCES, divergence
from skd_lib.distillation.methods import METHODS
from skd_lib.distillation.teacher_signal import DenseSignal, SignalPair, TeacherSignal
from skd_lib.errors import SkdError
from skd_lib.models.heads import lm_logits, vocabulary_size

CROSS_ENTROPY_ARRAYS = 6
"""fp32 arrays of a chunk's logits that the cross-entropy holds at most, as `arrays` of a divergence's entry."""
_CHUNK_GPU = 2**26
_CHUNK_CPU = 2**22
"""Elements of an array of logits: 256 and 16 MiB in fp32. A GPU is fast on long ones. On the CPU, arrays larger than
32 MiB come from the kernel, page by page, each time one is made; smaller ones are used again by the C library."""


class LossSums(NamedTuple):
    """Sums over N response positions.

    Attributes:
        loss: With its graph; divide it by the response tokens of the optimiser step.
        entropies: In nats, detached: `student`, and `teacher` where there is one. Of a sparse teacher signal, over
            its events.
        losses_N: The loss of each position, detached; without the cross-entropy added at replaced tokens.
    """

    loss: Tensor
    entropies: dict[str, Tensor]
    losses_N: Tensor


@dataclass(frozen=True)
class DistillationLoss:
    """The sum over the response tokens of a rollout.

    Attributes:
        divergence: From the teacher, at every token: a function of (log p_NE, log q_NE).
        temperature: Divides both logits in the divergence; the entropies are those of the divided logits.
        squared: Multiply the divergence by the temperature's square (Hinton et al. 2015, arXiv 1503.02531), so that
            its gradient keeps its size.
        selective: Weights of the divergence's terms (SelecTKD, arXiv 2510.24021); None: all 1.
        replaced_weight: Weight of the cross-entropy added at tokens that the teacher wrote.
    """

    divergence: Callable[[Tensor, Tensor], Tensor]
    temperature: float = 1.0
    squared: bool = False
    selective: SelectiveConfig | None = None
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
        """Return the sum over N response positions.

        Args:
            student: Its head makes the student's logits; gradients flow to the states and to the head.
            student_states_NH: Student states that predict the N response tokens.
            signal: The teacher's signal at the same positions.
            targets_N: The response tokens.
            by_teacher_N: True at those that the teacher wrote.
            chunk: Positions whose logits are held at once; by default see `loss_chunk`.

        Returns:
            Sums over the N positions; N = 0 gives 0 with a graph to every parameter involved.
        """
        models = [student, signal.teacher] if isinstance(signal, DenseSignal) else [student]
        size = chunk or _chunk_size(student_states_NH, *models)
        given = zip(torch.split(targets_N, size), torch.split(by_teacher_N, size), signal.split(size), strict=True)
        return _sum_over_chunks(self._of_chunk, student, student_states_NH, size, given)

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
        loss_N = self.divergence(compared.log_p_NE, compared.log_q_NE)
        if loss_N.shape != compared.log_p_NE.shape[:-1]:
            raise _wrong_shape(self.divergence, loss_N, compared.log_p_NE)
        if self.squared:
            loss_N = loss_N * self.temperature**2
        if self.selective is not None:
            loss_N = loss_N * selective_weights(self.selective, compared, logits_NV)
        loss = loss_N.sum()
        if self.replaced_weight:
            replaced = F.cross_entropy(logits_NV[by_teacher_N].float(), targets_N[by_teacher_N], reduction="sum")
            loss = loss + self.replaced_weight * replaced
        entropies = {"student": _entropy_sum(compared.log_q_NE), "teacher": _entropy_sum(compared.log_p_NE)}
        return LossSums(loss, entropies, loss_N.detach())


def _wrong_shape(divergence: Callable[[Tensor, Tensor], Tensor], loss: Tensor, log_p_NE: Tensor) -> SkdError:
    function = divergence.func if isinstance(divergence, partial) else divergence
    return SkdError(
        f"a divergence returns one number for each position, of shape {tuple(log_p_NE.shape[:-1])}; this one returns "
        f"shape {tuple(loss.shape)} for log-probabilities of shape {tuple(log_p_NE.shape)}",
        where=f"divergence {getattr(function, '__name__', function)}",
        hint="sum over the last dimension only, and leave the mean over positions to the loss: `.sum(-1)`",
    )


def selective_weights(selective: SelectiveConfig, compared: SignalPair, student_logits_NV: Tensor) -> Tensor:
    """Return (N,) weights, without gradient: 1 where the student's most likely token is among the teacher's top."""
    choice_N1 = student_logits_NV.detach()[..., : compared.vocabulary].argmax(-1, keepdim=True)
    trusted_N = (compared.teacher_top(selective.top) == choice_N1).any(-1)
    return torch.where(trusted_N, 1.0, selective.otherwise)


def cross_entropy_sum(
    student: PreTrainedModel, student_states_NH: Tensor, targets_N: Tensor, chunk: int | None = None
) -> LossSums:
    """Sum the cross-entropy over response positions, from final hidden states that predict the response tokens."""

    def of_chunk(student: PreTrainedModel, student_chunk_NH: Tensor, targets_chunk_N: Tensor) -> LossSums:
        logits_NV = lm_logits(student, student_chunk_NH)
        log_q_NV = F.log_softmax(_precise(logits_NV), dim=-1)
        loss_N = -log_q_NV.gather(-1, targets_chunk_N.unsqueeze(-1)).squeeze(-1)
        return LossSums(loss_N.sum(), {"student": _entropy_sum(log_q_NV)}, loss_N.detach())

    size = chunk or _chunk_size(student_states_NH, student)
    given = ((targets_chunk_N,) for targets_chunk_N in torch.split(targets_N, size))
    return _sum_over_chunks(of_chunk, student, student_states_NH, size, given)


Objective = Callable[[PreTrainedModel, Rollout], LossSums]
"""(student, rollout) -> sums over the rollout's response tokens, with a graph to the student's parameters."""


def objective_for(method: str, teacher: PreTrainedModel | None, distill: DistillConfig) -> Objective:
    """Return the objective of a method; the teacher is None where rollouts carry its signals, or none is asked."""
    if not METHODS[method].uses_divergence:
        return cross_entropy
    loss = loss_for(distill)

    def distillation(student: PreTrainedModel, rollout: Rollout) -> LossSums:
        signals = teacher_signals(teacher, rollout)
        states_NH = response_states(student, rollout)
        return loss(student, states_NH, signals[0].concatenate(signals), rollout.targets_N, rollout.by_teacher_N)

    return distillation


def cross_entropy(student: PreTrainedModel, rollout: Rollout) -> LossSums:
    """Return the cross-entropy of the response tokens."""
    return cross_entropy_sum(student, response_states(student, rollout), rollout.targets_N)


def loss_for(distill: DistillConfig) -> DistillationLoss:
    """Return the configured loss."""
    settings = {name: getattr(distill, name) for name in DIVERGENCES[distill.divergence].settings}
    return DistillationLoss(
        divergence(distill.divergence, **settings),
        temperature=distill.temperature,
        squared=distill.temperature_squared,
        selective=distill.selective,
        replaced_weight=distill.replaced_weight,
    )


def loss_chunk(hidden: int, vocabulary: int, *, gpu: bool) -> int:
    """Return the number of positions whose logits the loss holds at once.

    Each chunk adds to the head's gradient, which costs as much as a pass over `hidden` rows of logits: on the CPU,
    where chunks are short, an eighth of that is the least, so that it stays the smaller part.
    """
    if gpu:
        return max(1, _CHUNK_GPU // vocabulary)
    return max(1, _CHUNK_CPU // vocabulary, min(hidden // 8, _CHUNK_GPU // vocabulary))


def _chunk_size(states_NH: Tensor, *models: PreTrainedModel) -> int:
    vocabulary = max(vocabulary_size(model) for model in models)
    return loss_chunk(states_NH.shape[-1], vocabulary, gpu=states_NH.device.type != "cpu")


def _entropy_sum(log_probs_NE: Tensor) -> Tensor:
    detached_NE = log_probs_NE.detach()
    probs_NE = detached_NE.exp()
    return -(probs_NE * detached_NE.masked_fill(probs_NE == 0, 0)).sum()


def _sum_over_chunks(
    of_chunk: Callable[..., LossSums],
    student: PreTrainedModel,
    states_NH: Tensor,
    size: int,
    given: Iterable[tuple[Any, ...]],
) -> LossSums:
    """Add up `of_chunk(student, states, *given)` over chunks of `size` positions."""
    weights = [weight for weight in student.get_output_embeddings().parameters() if weight.requires_grad]
    wanted = torch.is_grad_enabled() and (states_NH.requires_grad or bool(weights))
    loss = torch.zeros((), device=states_NH.device)
    entropies: dict[str, Tensor] = {}
    losses: list[Tensor] = []
    of_states: list[Tensor] = []
    of_weights: list[Tensor] = []
    for chunk_NH, inputs in zip(torch.split(states_NH.detach(), size), given, strict=True):
        sums = of_chunk(student, chunk_NH.requires_grad_(wanted), *inputs)
        loss = loss + sums.loss.detach()
        losses.append(sums.losses_N)
        entropies = {name: entropies.get(name, 0) + entropy for name, entropy in sums.entropies.items()}
        if wanted:
            gradient_NH, *gradients = torch.autograd.grad(sums.loss, [chunk_NH, *weights])
            of_states.append(gradient_NH)
            # Added up in fp32 whatever the head's dtype.
            pairs = zip_longest(of_weights, gradients)
            of_weights = [_precise(added) if total is None else total.add_(added) for total, added in pairs]
    if wanted:
        loss = GradientInForward.apply(loss, [torch.cat(of_states), *of_weights], states_NH, *weights)  # type: ignore[no-untyped-call]
    return LossSums(loss, entropies, torch.cat(losses))


def _precise(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


class GradientInForward(torch.autograd.Function):
    """A number whose gradient with respect to some tensors is known already."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: list[Tensor], *tensors: Tensor) -> Tensor:
        """Return the number."""
        ctx.gradients, ctx.dtypes = gradients, [tensor.dtype for tensor in tensors]
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, factor: Tensor) -> tuple[Tensor | None, ...]:
        """Return its gradient times `factor`; in place, so that no second copy of the head's is made."""
        gradients, ctx.gradients = ctx.gradients, None
        scaled = [gradient.mul_(factor).to(dtype) for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)]
        return None, None, *scaled
