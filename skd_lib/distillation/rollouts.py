"""Where a training response comes from: one small strategy a method.

Token ids go from here to the loss as they are; nothing is decoded or tokenised again.

=================  =====================================================================
method             response
=================  =====================================================================
`sft`              ground truth
`seqkd`            the teacher's samples
`supervised_kd`    ground truth
`on_policy`        the student's samples, in a share of the optimiser steps
`imitkd`           the student's samples, in a share of the sequences
`two_stage`        ground truth in the first half of the steps, then the student's samples
`skd`              interleaved: the student drafts, the teacher replaces
`skd_mixed`        interleaved, in a share of the sequences
=================  =====================================================================

The sequences or steps that are not sampled are ground truth.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from transformers import PreTrainedModel

from skd_lib._core.seeds import derived, uniform
from skd_lib.config import DistillConfig, InterleavedConfig, Method, Schedule
from skd_lib.distillation.batch import Rollout, Source, collate, merge
from skd_lib.distillation.methods import METHODS
from skd_lib.distillation.schedules import value_at
from skd_lib.distillation.teacher_signal import DenseSignal
from skd_lib.errors import SkdError
from skd_lib.models.heads import vocabulary_size
from skd_lib.sampling.acceptance import AcceptanceRule, lossless, min_prob, mixture, student_only, teacher_only, top_k
from skd_lib.sampling.drafting import AdaptiveGamma
from skd_lib.sampling.engine import TEACHER, Sampler

if TYPE_CHECKING:
    from skd_lib.data.tokenize import TokenizedExample


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


def ground_truth(pad_id: int, device: torch.device | str = "cpu") -> Strategy:
    """The examples' own responses."""

    def strategy(examples: Sequence[TokenizedExample], places: Sequence[Place]) -> Rollout:  # noqa: ARG001
        prompts, responses = ([e.prompt_ids for e in examples], [e.response_ids for e in examples])
        return collate(prompts, responses, pad_id=pad_id, source="ground_truth", device=device)

    return strategy


def sampled(sampler_at: Callable[[int], Sampler], *, source: Source, seed: int, device: torch.device) -> Strategy:
    """Responses from the decoding engine, as it is set up at an optimiser step; with the teacher's states where it
    keeps them."""

    def strategy(examples: Sequence[TokenizedExample], places: Sequence[Place]) -> Rollout:
        sampler = sampler_at(places[0].step)
        prompts = [example.prompt_ids for example in examples]
        samples = sampler.sample(prompts, seeds=[row_seed(seed, place) for place in places])
        lengths_B = samples.mask_BT.sum(1).tolist()
        responses = [row[:length] for row, length in zip(samples.tokens_BT.tolist(), lengths_B, strict=True)]
        rollout = collate(prompts, responses, pad_id=sampler.pad_id, source=source, device=device)
        by_teacher_BL, proposals_BL = rollout.by_teacher_BL.clone(), rollout.proposals_BL.clone()
        by_teacher_BL[rollout.response_mask_BL] = (samples.source_BT[samples.mask_BT] == TEACHER).to(device)
        proposals_BL[rollout.response_mask_BL] = samples.proposals_BT[samples.mask_BT].to(device)
        signals = rollout.signals
        if samples.teacher_states_BTH is not None:
            assert sampler.teacher is not None  # noqa: S101 - it has just been asked
            states_NH = samples.teacher_states_BTH[samples.mask_BT].to(device)
            signals = tuple(DenseSignal(states_NH, sampler.teacher).split(lengths_B))
        return replace(
            rollout,
            by_teacher_BL=by_teacher_BL,
            proposals_BL=proposals_BL,
            signals=signals,
            statistics=samples.statistics,
        )

    return strategy


Draw = Callable[[Place], float]
"""A uniform number in [0, 1) for a row: one of its own, or one for all rows of a step."""


def mixed(share_at: Callable[[int], float], draw: Draw, chosen: Strategy, otherwise: Strategy, pad_id: int) -> Strategy:
    """`chosen` for a share of the rows, `otherwise` for the rest.

    A row's fate depends on its place alone, not on the batch it is in. Each strategy is called once at most, with all
    of its rows.

    Args:
        share_at: Optimiser step -> share of `chosen`.
        draw: A row is `chosen` if its number is below the share.
        chosen: Makes one kind of response.
        otherwise: Makes the other.
        pad_id: Fills rows up.
    """

    def strategy(examples: Sequence[TokenizedExample], places: Sequence[Place]) -> Rollout:
        parts: list[Rollout] = []
        order: list[int] = []
        for make, wanted in ((chosen, True), (otherwise, False)):
            rows = [row for row, place in enumerate(places) if (draw(place) < share_at(place.step)) == wanted]
            if rows:
                parts.append(make([examples[row] for row in rows], [places[row] for row in rows]))
                order += rows
        return parts[0] if len(parts) == 1 else merge(parts, order, pad_id)

    return strategy


def rollout_for(
    method: Method,
    *,
    student: PreTrainedModel,
    teacher: PreTrainedModel | None,
    distill: DistillConfig,
    steps: int,
    seed: int,
    eos_ids: tuple[int, ...],
    pad_id: int,
    max_new_tokens: int,
) -> Strategy:
    """The strategy of a method.

    Args:
        method: See the table at the top of this module.
        student: The model in training.
        teacher: Needed where responses are sampled.
        distill: Its sampling section and fractions are used.
        steps: Optimiser steps of the training, over which schedules run.
        seed: The run's seed.
        eos_ids: Ids that end a response.
        pad_id: Fills rows up; may be one of `eos_ids`.
        max_new_tokens: Longest sampled response.

    Raises:
        SkdError: the method needs a teacher and there is none.
    """
    facts = METHODS[method]
    truth = ground_truth(pad_id, student.device)
    if not (facts.student_writes or facts.teacher_writes):
        return truth
    if teacher is None:
        raise SkdError(f"method `{method}` needs a teacher", where="distill")
    settings = distill.sampling

    @lru_cache(maxsize=1)
    def sampler(rule: AcceptanceRule, gamma: int) -> Sampler:
        return Sampler(
            student=student if rule.drafts else None,
            teacher=teacher if rule.asks_teacher else None,
            rule=rule,
            gamma=AdaptiveGamma(gamma) if settings.adaptive_gamma else gamma,
            student_params=settings.student,
            teacher_params=settings.teacher,
            eos_ids=eos_ids,
            pad_id=pad_id,
            max_new_tokens=max_new_tokens,
            keep_teacher_states=facts.divergence and rule.asks_teacher,
            # An id that only one of the two padded vocabularies has stands for no token.
            vocabulary=min(vocabulary_size(student), vocabulary_size(teacher)),
        )

    def rule_at(step: int) -> AcceptanceRule:
        if not facts.student_writes:
            return teacher_only()
        return interleaving_rule(settings, step, steps) if facts.teacher_writes else student_only()

    def sampler_at(step: int) -> Sampler:
        return sampler(rule_at(step), round(value_at(settings.gamma, step, steps)))

    source: Source = "student" if not facts.teacher_writes else "interleaved" if facts.student_writes else "teacher"
    strategy = sampled(sampler_at, source=source, seed=seed, device=student.device)

    def of_step(place: Place) -> float:
        return step_uniform(seed, place.step)

    def of_row(place: Place) -> float:
        return row_uniform(seed, place)

    match method:
        case "on_policy":
            return mixed(
                lambda step: value_at(distill.on_policy_fraction, step, steps), of_step, strategy, truth, pad_id
            )
        case "two_stage":
            return mixed(lambda step: float(2 * step >= steps), of_step, strategy, truth, pad_id)
        case "imitkd" | "skd_mixed":
            return mixed(lambda step: value_at(distill.sampled_fraction, step, steps), of_row, strategy, truth, pad_id)
    return strategy


def interleaving_rule(settings: InterleavedConfig, step: int, steps: int) -> AcceptanceRule:
    """The acceptance rule of the configuration at an optimiser step.

    Probabilities that follow a schedule are rounded, so that a long training has few values: each is a sampler of its
    own, which on a GPU captures CUDA graphs of its own.
    """

    def share(setting: float | Schedule[Any]) -> float:
        value = value_at(setting, step, steps)
        return rounded(value) if isinstance(setting, Schedule) else value

    match settings.rule:
        case "top_k":
            return top_k(round(value_at(settings.top_k, step, steps)))
        case "min_prob":
            return min_prob(share(settings.min_prob))
        case "mixture":
            return mixture(share(settings.mixture))
        case "lossless":
            return lossless()


def rounded(probability: float) -> float:
    """Return a probability in two digits, or its distance from 1 where that is less.

    From 0.1 to 0.9 these are hundredths, near 0 and 1 finer ones: what is neither 0 nor 1 stays so, within 5 %.
    """
    edge = min(probability, 1 - probability)
    return round(probability, 1 - math.floor(math.log10(edge))) if edge > 0 else probability


def row_seed(seed: int, place: Place) -> int:
    """Seed of one row, 63 bits: a function of the run's seed and the row's place, so that a resumed run repeats it."""
    return derived("row", seed, *place) >> 1


def step_uniform(seed: int, step: int) -> float:
    """A uniform number in [0, 1) that belongs to an optimiser step."""
    return uniform("step", seed, step)


def row_uniform(seed: int, place: Place) -> float:
    """A uniform number in [0, 1) that belongs to a row, and is not the one its response is sampled with."""
    return uniform("source", seed, *place)
