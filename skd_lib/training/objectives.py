"""What is minimised on a rollout: the cross-entropy of its tokens, or a divergence from the teacher."""

from __future__ import annotations

from collections.abc import Callable

from transformers import PreTrainedModel

from skd_lib.divergences import Divergence, LossSums, cross_entropy_sum, distillation_loss
from skd_lib.rollouts import Rollout, response_states, teacher_response_states

Objective = Callable[[PreTrainedModel, Rollout], LossSums]
"""(student, rollout) -> sums over the rollout's response tokens, with a graph to the student's parameters."""


def cross_entropy(student: PreTrainedModel, rollout: Rollout) -> LossSums:
    """Cross-entropy of the response tokens."""
    return cross_entropy_sum(student, response_states(student, rollout), rollout.targets_N)


def distillation(teacher: PreTrainedModel, divergence: Divergence, temperature: float) -> Objective:
    """A divergence from the (frozen) teacher's next-token distributions along the response."""

    def objective(student: PreTrainedModel, rollout: Rollout) -> LossSums:
        teacher_states_NH = teacher_response_states(teacher, rollout)
        student_states_NH = response_states(student, rollout)
        return distillation_loss(student, student_states_NH, teacher, teacher_states_NH, divergence, temperature)

    return objective
