"""How many tokens to draft for one teacher call.

A drafted token that follows a rejected one is wasted, a short block wastes teacher calls. With acceptance rate `a`, a
block of G drafted tokens yields 1 + a + ... + a^(G-1) response tokens (one more term where the teacher adds a bonus):
the accepted prefix, and the teacher's token after it. It costs G student forwards and one teacher forward over the
block. The best G has the most tokens for its cost (as Leviathan et al. 2023, theorem 3.8, with the block's width).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from skd_lib.sampling.samples import SamplingStatistics

_PRIOR_WEIGHT = 16
"""The expected acceptance counts as much as this many tested tokens: what is measured soon outweighs it."""


@dataclass(frozen=True)
class Costs:
    """What forwards cost, in units of a teacher forward of a single token.

    Attributes:
        student: A student forward of a single token.
        token: What each further token adds to a forward, in another row or at another position: a share of what the
            first one costs.
        several: What it adds that there are further tokens at all, likewise.
    """

    student: float
    token: float
    several: float = 0.0

    def of_block(self, gamma: int, *, rows: int, bonus: bool) -> float:
        """Cost of drafting `gamma` tokens in each row, and scoring them (and the position after them, for a bonus).

        After a bonus the student's first forward reads two tokens a row.
        """
        drafting = self._share(rows * (1 + bonus)) + (gamma - 1) * self._share(rows)
        return self.student * drafting + self._share(rows * (gamma + bonus))

    def _share(self, tokens: int) -> float:
        return 1 + (self.several if tokens > 1 else 0) + self.token * (tokens - 1)


@dataclass(frozen=True)
class AdaptiveGamma:
    """A draft length chosen anew each round from the acceptance measured so far in the call.

    The choice is a function of the accepted and tested tokens and the rows in flight, never of a clock: a call with the
    same prompts and seeds makes the same rounds. Nothing is carried from call to call, so that a run that was
    interrupted goes on as it would have.

    Attributes:
        maximum: The longest block.
        acceptance: Acceptance rate expected before anything is measured.
        costs: What forwards cost; None estimates it from the models (`estimated_costs`).
    """

    maximum: int
    acceptance: float = 0.7
    costs: Costs | None = None

    def choose(self, counts: SamplingStatistics, costs: Costs, *, rows: int, bonus: bool) -> int:
        """The draft length of the next round, 1 to `maximum`.

        Args:
            counts: Of the rounds so far.
            costs: What forwards cost.
            rows: In the next round.
            bonus: Whether the teacher adds a token after a block that was accepted whole.
        """
        expected = _PRIOR_WEIGHT * self.acceptance
        acceptance = (counts.accepted + expected) / (counts.tested + _PRIOR_WEIGHT)

        def tokens_per_cost(gamma: int) -> float:
            return sum(acceptance**i for i in range(gamma + bonus)) / costs.of_block(gamma, rows=rows, bonus=bonus)

        return max(range(1, self.maximum + 1), key=tokens_per_cost)


def estimated_costs(student: PreTrainedModel, teacher: PreTrainedModel) -> Costs:
    """Costs from the number of weights that a forward reads, and the kind of its arithmetic.

    On a GPU many tokens cost what one token costs: the time goes into reading the weights. On a CPU each adds its
    share. Seen with a 135M-parameter teacher on 2 cores, in units of one token in one row: in bfloat16, with
    instructions for it, 1.6 with 8 rows and 4.1 with 5 positions in each; in fp32 1.5 and 2.6, most of the first being
    the step from a matrix times a vector to a matrix times a matrix.
    """
    ratio = weights_read(student) / weights_read(teacher)
    if teacher.device.type != "cpu":
        return Costs(ratio, token=0.0)
    return Costs(ratio, token=0.03, several=0.4) if teacher.dtype == torch.float32 else Costs(ratio, token=0.08)


def weights_read(model: PreTrainedModel) -> int:
    """All weights, but for an embedding that is not the head as well: only few of its rows are read."""
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    return sum(weight.numel() for weight in model.parameters() if weight is not embedding or weight is head)
