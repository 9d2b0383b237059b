"""A few sampled training sequences, recorded for the report.

Their steps and rows alone decide which sequences are recorded, so that a resumed run records the same ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from skd_lib.distillation.batch import Rollout
from skd_lib.distillation.rollouts import RowKey
from skd_lib.distillation.teacher_signal import DenseSignal
from skd_lib.models.heads import lm_logits
from skd_lib.sampling.samples import STUDENT, TEACHER

SEQUENCES = 3
"""Sequences recorded in a step."""
MOMENTS = 24
"""Recorded steps of a run, at most."""
_POSITIONS_AT_A_TIME = 64
"""Positions whose logits over the whole vocabulary are in memory together."""


@dataclass(frozen=True)
class Replacement:
    """A draft of the student that the teacher replaced, at a position in the response.

    Ranks are among the teacher's raw logits, from 0: SKD rejects at K and above. Probabilities are the teacher's,
    before temperature and top-p. Those of its own token follow.
    """

    position: int
    proposal: int
    rank: int
    probability: float
    own_rank: int
    own_probability: float


@dataclass(frozen=True)
class Trace:
    """One sampled training sequence: its optimiser step, from 1, and its row in the step's global batch.

    Writers are `STUDENT` or `TEACHER` (`skd_lib.sampling.samples`) for each response token.
    """

    step: int
    row: int
    prompt_ids: list[int]
    token_ids: list[int]
    writers: list[int]
    replacements: list[Replacement]

    @classmethod
    def of(cls, values: dict[str, Any]) -> Trace:
        """Make a trace from the JSON of `dataclasses.asdict`."""
        return cls(**{**values, "replacements": [Replacement(**each) for each in values["replacements"]]})


def recorded_steps(steps: int, eval_steps: int) -> frozenset[int]:
    """Return the first optimiser step and those before a validation; of many, `MOMENTS` evenly spread ones."""
    due = sorted({1, *range(eval_steps, steps + 1, eval_steps), steps})
    if len(due) <= MOMENTS:
        return frozenset(due)
    return frozenset(due[round(i * (len(due) - 1) / (MOMENTS - 1))] for i in range(MOMENTS))


@dataclass(frozen=True)
class TraceRecorder:
    """Records traces of rollouts: some steps, from 1, and in each the sequences of the lowest rows.

    Ids from the common vocabulary's size on are no tokens, and have no rank.
    """

    vocabulary: int
    steps: frozenset[int]
    sequences: int = SEQUENCES

    @torch.no_grad()
    def record(self, rollout: Rollout, places: Sequence[RowKey]) -> list[Trace]:
        """Record one optimiser step's rollout, whose rows are at `places`, if the step is to be recorded.

        Rows of ground truth have no trace.
        """
        step = places[0].step + 1
        if step not in self.steps:
            return []
        rows = [row for row, source in enumerate(rollout.sources) if source != "ground_truth"]
        rows = sorted(rows, key=lambda row: places[row].row)[: self.sequences]
        return [self._trace(rollout.rows([row]), step, places[row].row) for row in rows]

    def _trace(self, rollout: Rollout, step: int, place: int) -> Trace:
        """Record a rollout's only row."""
        first = int(rollout.response_mask_BL[0].nonzero()[0]) + 1
        return Trace(
            step=step,
            row=place,
            prompt_ids=rollout.input_ids_BL[0, :first].tolist(),
            token_ids=rollout.targets_N.tolist(),
            writers=[TEACHER if by_teacher else STUDENT for by_teacher in rollout.by_teacher_N.tolist()],
            replacements=self._replacements(rollout),
        )

    def _replacements(self, rollout: Rollout) -> list[Replacement]:
        (signal,) = rollout.signals
        if not isinstance(signal, DenseSignal):
            return []
        positions_R = (rollout.proposals_N >= 0).nonzero().squeeze(-1)
        states_RH = signal.states_NH[positions_R]
        pairs_R2 = torch.stack([rollout.proposals_N, rollout.targets_N], dim=-1)[positions_R]
        replacements = []
        for positions, states, pairs in zip(
            *(torch.split(tensor, _POSITIONS_AT_A_TIME) for tensor in (positions_R, states_RH, pairs_R2)), strict=True
        ):
            logits_RV = lm_logits(signal.teacher, states)[:, : self.vocabulary]
            ranks_R2, probabilities_R2 = _judged(logits_RV.float(), pairs)
            replacements += [
                Replacement(position, proposal, rank, probability, own_rank, own_probability)
                for position, (proposal, _), (rank, own_rank), (probability, own_probability) in zip(
                    positions.tolist(), pairs.tolist(), ranks_R2.tolist(), probabilities_R2.tolist(), strict=True
                )
            ]
        return replacements


def _judged(logits_RV: Tensor, tokens_R2: Tensor) -> tuple[Tensor, Tensor]:
    """Return ranks, from 0, and probabilities of two tokens at each position."""
    chosen_R2 = logits_RV.gather(1, tokens_R2)
    ranks_R2 = (logits_RV.unsqueeze(1) > chosen_R2.unsqueeze(2)).sum(-1)
    return ranks_R2, (chosen_R2 - logits_RV.logsumexp(-1, keepdim=True)).exp()
