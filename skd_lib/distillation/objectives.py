"""What is minimised on a rollout: the cross-entropy of its tokens, or a divergence from the teacher."""

from __future__ import annotations

from collections.abc import Callable

from transformers import PreTrainedModel

from skd_lib.config import DistillConfig, Method
from skd_lib.distillation.batch import Rollout, response_states, teacher_signals
from skd_lib.distillation.divergences import divergence
from skd_lib.distillation.loss import DistillationLoss, LossSums, Selective, cross_entropy_sum
from skd_lib.distillation.methods import METHODS

Objective = Callable[[PreTrainedModel, Rollout], LossSums]
"""(student, rollout) -> sums over the rollout's response tokens, with a graph to the student's parameters."""


def objective_for(method: Method, teacher: PreTrainedModel | None, distill: DistillConfig) -> Objective:
    """What a method minimises.

    Args:
        method: Cross-entropy or divergence, see `skd_lib.distillation.methods`.
        teacher: Frozen; None where the method asks none, or where rollouts carry what it says.
        distill: The divergence and its options.
    """
    if not METHODS[method].divergence:
        return cross_entropy
    return distillation(teacher, loss_for(distill))


def loss_for(distill: DistillConfig) -> DistillationLoss:
    """The configured loss."""
    selective = distill.selective
    return DistillationLoss(
        divergence(distill.divergence, beta=distill.beta, alpha=distill.alpha),
        temperature=distill.temperature,
        squared=distill.temperature_squared,
        selective=None if selective is None else Selective(selective.top, selective.otherwise),
        replaced_weight=distill.replaced_weight,
    )


def cross_entropy(student: PreTrainedModel, rollout: Rollout) -> LossSums:
    """Cross-entropy of the response tokens."""
    return cross_entropy_sum(student, response_states(student, rollout), rollout.targets_N)


def distillation(teacher: PreTrainedModel | None, loss: DistillationLoss) -> Objective:
    """A divergence from the (frozen) teacher's next-token distributions along the response."""

    def objective(student: PreTrainedModel, rollout: Rollout) -> LossSums:
        signals = teacher_signals(teacher, rollout)
        signal = signals[0].concatenate(signals)
        states_NH = response_states(student, rollout)
        return loss(student, states_NH, signal, rollout.targets_N, rollout.by_teacher_N)

    return objective
