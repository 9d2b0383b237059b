"""The number of tokens to draft for one teacher call.

A drafted token that follows a rejected one is wasted, a short block wastes teacher calls. With acceptance rate `a`, a
block of G drafted tokens yields 1 + a + ... + a^(G-1) response tokens (one more term where the teacher adds a bonus):
the accepted prefix, and the teacher's token after it. It costs G student forwards and one teacher forward over the
block. The best G has the most tokens for its cost (as Leviathan et al. 2023, theorem 3.8, with the block's width).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel

from skd_lib.sampling.samples import SamplingStatistics

_PRIOR_WEIGHT = 16
"""The expected acceptance counts as much as this many tested tokens: measured tokens soon outweigh it."""


@dataclass(frozen=True)
class Costs:
    """The cost of forwards, in units of a teacher forward of a single token.

    Attributes:
        student: A student forward of a single token.
        token: Cost of each further token of a forward, in another row or at another position, as a share of the first
            token's cost.
    """

    student: float
    token: float

    def of_block(self, gamma: int, *, rows: int, bonus: bool) -> float:
        """Return the cost of drafting `gamma` tokens in each row and scoring them (with the bonus position, if any)."""
        drafting = gamma * self.student * self._share(rows)
        return drafting + self._share(rows * (gamma + bonus))

    def _share(self, tokens: int) -> float:
        return 1 + self.token * (tokens - 1)


@dataclass(frozen=True)
class AdaptiveGamma:
    """A draft length chosen again each round from the acceptance measured so far in the call.

    The choice is a function of the accepted and tested tokens and the rows in flight, never of a clock: a call with the
    same prompts and seeds makes the same rounds. Nothing is carried from call to call, so that a run that was
    interrupted goes on as it would have.

    Attributes:
        maximum: The longest block.
        acceptance: Acceptance rate expected before anything is measured.
        costs: Costs of forwards; None estimates them from the models (`estimated_costs`).
    """

    maximum: int
    acceptance: float = 0.7
    costs: Costs | None = None

    def choose(self, counts: SamplingStatistics, costs: Costs, *, rows: int, bonus: bool) -> int:
        """Choose the draft length of the next round, of `rows`, from the rounds so far: 1 to `maximum`."""
        expected = _PRIOR_WEIGHT * self.acceptance
        acceptance = (counts.accepted + expected) / (counts.tested + _PRIOR_WEIGHT)

        best, best_rate = 1, 0.0
        for gamma in range(1, self.maximum + 1):
            tokens = expected_tokens([acceptance] * (gamma - 1 + bonus))
            rate = tokens / costs.of_block(gamma, rows=rows, bonus=bonus)
            if rate <= best_rate:
                break  # ever fewer tokens for each further draft, at a cost that never falls
            best, best_rate = gamma, rate
        return best


def expected_tokens(acceptance: Sequence[float]) -> float:
    """Return the expected tokens of a block: the accepted prefix of its drafts, and the teacher's token after it.

    Rates are those of each position that is tested, given that all before it were accepted.
    """
    total, reached = 1.0, 1.0
    for rate in acceptance:
        reached *= rate
        total += reached
    return total


def estimated_costs(student: PreTrainedModel, teacher: PreTrainedModel) -> Costs:
    """Estimate costs from the number of weights that a forward reads.

    On a GPU many tokens cost what one token costs: the time goes into reading the weights. On a CPU each adds about
    0.08 of it (a 135M-parameter teacher in bfloat16, 8 rows, 2 cores: 5 positions take 2.6 times as long as one).
    """
    return Costs(weights_read(student) / weights_read(teacher), 0.08 if teacher.device.type == "cpu" else 0.0)


def weights_read(model: PreTrainedModel) -> int:
    """Count all weights but those of an embedding that is not also the head: only few of its rows are read."""
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    return sum(weight.numel() for weight in model.parameters() if weight is not embedding or weight is head)
