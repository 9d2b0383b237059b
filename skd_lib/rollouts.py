"""Where a training response comes from: one small strategy a method.

Token ids go from here to the loss as they are; nothing is decoded or tokenised again.

=================  ==========================================================
method             response
=================  ==========================================================
`sft`              ground truth
`supervised_kd`    ground truth
`on_policy`        the student's samples, in a share of the optimiser steps
`skd`              interleaved: the student drafts, the teacher replaces
=================  ==========================================================
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, NamedTuple, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from skd_lib.config import DistillConfig, Method
from skd_lib.errors import SkdError
from skd_lib.models.heads import decoder, vocabulary_size
from skd_lib.sampling.acceptance import everything, top_k
from skd_lib.sampling.drafting import AdaptiveGamma
from skd_lib.sampling.engine import Sampler, SamplingStatistics

if TYPE_CHECKING:
    from skd_lib.data.tokenize import TokenizedExample

Source = Literal["ground_truth", "student", "interleaved"]


@dataclass(frozen=True)
class Rollout:
    """Prompts with their responses, ready for the loss.

    Attributes:
        input_ids_BL: Prompt, response, padding; right padded, so a causal decoder needs no attention mask: no real
            position sees a padded one.
        response_mask_BL: True at position i if token i + 1 belongs to the response, that is where the model's
            output predicts a response token. So the last prompt position is True (it predicts the first response
            token), the position before EOS is True (it predicts EOS), EOS itself and the last column are False.
            Made from lengths, never from token ids: a pad id equal to the EOS id hides nothing.
        source: Who wrote the responses.
        teacher_states_NH: The teacher's final states at the N True positions, in row-major order, where the sampler
            has them anyway; None otherwise.
        writers_N: Who wrote each of the N response tokens, `STUDENT` or `TEACHER`; None for ground truth.
        proposals_N: The student's draft where the teacher replaced it, -1 elsewhere; None for ground truth.
        statistics: The sampler's figures; None for ground truth.
    """

    input_ids_BL: Tensor
    response_mask_BL: Tensor
    source: Source
    teacher_states_NH: Tensor | None = None
    writers_N: Tensor | None = None
    proposals_N: Tensor | None = None
    statistics: SamplingStatistics | None = None

    @property
    def targets_N(self) -> Tensor:  # noqa: N802
        """The response tokens, in row-major order."""
        return self.input_ids_BL[:, 1:][self.response_mask_BL[:, :-1]]

    @property
    def tokens(self) -> int:
        """Number of response tokens, EOS included."""
        return int(self.response_mask_BL.sum())

    def split(self, sizes: Sequence[int]) -> list[Rollout]:
        """Micro-batches of the given numbers of rows, with what the loss needs alone.

        Rows of like length go together, and each micro-batch is cut to its longest row: a sum over tokens does not
        depend on the grouping, its cost does.
        """
        columns_L = torch.arange(1, self.response_mask_BL.shape[1] + 1, device=self.response_mask_BL.device)
        # The last True column predicts the token after it.
        lengths_B = (columns_L * self.response_mask_BL).amax(1) + 1
        order_B = lengths_B.argsort(stable=True)
        states: list[Tensor] | None = None
        if self.teacher_states_NH is not None:
            states = list(torch.split(self.teacher_states_NH, self.response_mask_BL.sum(1).tolist()))
        parts = []
        for rows in torch.split(order_B, list(sizes)):
            length = int(lengths_B[rows].max())
            states_NH = None if states is None else torch.cat([states[row] for row in rows.tolist()])
            parts.append(
                Rollout(self.input_ids_BL[rows, :length], self.response_mask_BL[rows, :length], self.source, states_NH)
            )
        return parts

    def to(self, device: torch.device) -> Rollout:
        """The same rollout on another device."""
        states_NH = self.teacher_states_NH
        return replace(
            self,
            input_ids_BL=self.input_ids_BL.to(device),
            response_mask_BL=self.response_mask_BL.to(device),
            teacher_states_NH=None if states_NH is None else states_NH.to(device),
        )


class Place(NamedTuple):
    """Where a row stands in a run: its seed and so its response depend on this alone.

    Attributes:
        step: Optimiser step, from 0.
        row: Index in the step's global batch, over all micro-batches and processes.
    """

    step: int
    row: int


Strategy = Callable[[Sequence["TokenizedExample"], Sequence[Place]], Rollout]
"""Makes the responses to some examples' prompts; all places are of one optimiser step."""


def collate(
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    *,
    pad_id: int,
    source: Source,
    device: torch.device | str = "cpu",
) -> Rollout:
    """Pad prompts and responses into one batch.

    Raises:
        SkdError: a prompt is empty, so nothing could predict its first response token.
    """
    if not all(prompts):
        raise SkdError("a prompt has no tokens", hint="use a chat template, or a tokenizer that adds a BOS token")
    rows = [[*prompt, *response] for prompt, response in zip(prompts, responses, strict=True)]
    longest = max(map(len, rows))
    input_ids_BL = torch.tensor([row + [pad_id] * (longest - len(row)) for row in rows])
    starts_B1 = torch.tensor([[len(prompt) - 1] for prompt in prompts])
    ends_B1 = torch.tensor([[len(row) - 1] for row in rows])
    positions_L = torch.arange(longest)
    response_mask_BL = (positions_L >= starts_B1) & (positions_L < ends_B1)
    return Rollout(input_ids_BL.to(device), response_mask_BL.to(device), source)


def ground_truth(pad_id: int, device: torch.device | str = "cpu") -> Strategy:
    """The examples' own responses."""

    def strategy(examples: Sequence[TokenizedExample], places: Sequence[Place]) -> Rollout:  # noqa: ARG001
        prompts, responses = ([e.prompt_ids for e in examples], [e.response_ids for e in examples])
        return collate(prompts, responses, pad_id=pad_id, source="ground_truth", device=device)

    return strategy


def sampled(sampler: Sampler, student: PreTrainedModel, *, source: Source, seed: int, pad_id: int) -> Strategy:
    """Responses from the decoding engine, with the teacher's states where it keeps them."""

    def strategy(examples: Sequence[TokenizedExample], places: Sequence[Place]) -> Rollout:
        prompts = [example.prompt_ids for example in examples]
        samples = sampler.sample(prompts, seeds=[row_seed(seed, place) for place in places])
        lengths_B = samples.mask_BT.sum(1).tolist()
        responses = [row[:length] for row, length in zip(samples.tokens_BT.tolist(), lengths_B, strict=True)]
        rollout = collate(prompts, responses, pad_id=pad_id, source=source, device=student.device)
        states_BTH = samples.teacher_states_BTH
        states_NH = None if states_BTH is None else states_BTH[samples.mask_BT].to(student.device)
        return replace(
            rollout,
            teacher_states_NH=states_NH,
            writers_N=samples.source_BT[samples.mask_BT].to(student.device),
            proposals_N=samples.proposals_BT[samples.mask_BT].to(student.device),
            statistics=samples.statistics,
        )

    return strategy


def step_mixture(fraction: float, chosen: Strategy, otherwise: Strategy, *, seed: int) -> Strategy:
    """`chosen` in that fraction of the optimiser steps, `otherwise` in the others (GKD's lambda)."""

    def strategy(examples: Sequence[TokenizedExample], places: Sequence[Place]) -> Rollout:
        use_chosen = step_uniform(seed, places[0].step) < fraction
        return (chosen if use_chosen else otherwise)(examples, places)

    return strategy


def rollout_for(
    method: Method,
    *,
    student: PreTrainedModel,
    teacher: PreTrainedModel | None,
    distill: DistillConfig,
    seed: int,
    eos_ids: tuple[int, ...],
    pad_id: int,
    max_new_tokens: int,
) -> Strategy:
    """The strategy of a method.

    Args:
        method: See the table at the top of this module.
        student: The model in training.
        teacher: Needed for `skd`.
        distill: Its sampling section and `on_policy_fraction` are used.
        seed: The run's seed.
        eos_ids: Ids that end a response.
        pad_id: Fills rows up; may be one of `eos_ids`.
        max_new_tokens: Longest sampled response.

    Raises:
        SkdError: the method needs a teacher and there is none.
    """
    truth = ground_truth(pad_id, student.device)
    if method in ("sft", "supervised_kd"):
        return truth
    if teacher is None:
        raise SkdError(f"method `{method}` needs a teacher", where="distill")
    settings = distill.sampling
    interleaved = method == "skd"
    sampler = Sampler(
        student=student,
        teacher=teacher if interleaved else None,
        rule=top_k(settings.top_k) if interleaved else everything(),
        gamma=AdaptiveGamma(settings.gamma) if settings.adaptive_gamma else settings.gamma,
        student_params=settings.student,
        teacher_params=settings.teacher,
        eos_ids=eos_ids,
        pad_id=pad_id,
        max_new_tokens=max_new_tokens,
        keep_teacher_states=interleaved,
        # An id that only one of the two padded vocabularies has stands for no token.
        vocabulary=min(vocabulary_size(student), vocabulary_size(teacher)),
    )
    source: Source = "interleaved" if interleaved else "student"
    strategy = sampled(sampler, student, source=source, seed=seed, pad_id=pad_id)
    if interleaved or distill.on_policy_fraction == 1:
        return strategy
    return step_mixture(distill.on_policy_fraction, strategy, truth, seed=seed)


def response_states(model: PreTrainedModel, rollout: Rollout) -> Tensor:
    """(N, H) final hidden states of `model` at the positions that predict the rollout's response tokens."""
    hidden_BLH = decoder(model)(input_ids=rollout.input_ids_BL, use_cache=False).last_hidden_state
    return cast(Tensor, hidden_BLH[rollout.response_mask_BL])


@torch.no_grad()
def teacher_response_states(teacher: PreTrainedModel, rollout: Rollout) -> Tensor:
    """(N, H) teacher states for the loss: the sampler's own where it kept them, else from one forward pass."""
    if rollout.teacher_states_NH is not None:
        return rollout.teacher_states_NH
    return response_states(teacher, rollout)


def row_seed(seed: int, place: Place) -> int:
    """Seed of one row, 63 bits: a function of the run's seed and the row's place, so that a resumed run repeats it."""
    return _hash("row", seed, *place) >> 1


def step_uniform(seed: int, step: int) -> float:
    """A uniform number in [0, 1) that belongs to an optimiser step."""
    return (_hash("step", seed, step) >> 11) / 2**53


def _hash(*parts: int | str) -> int:
    text = "/".join(map(str, parts))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")
