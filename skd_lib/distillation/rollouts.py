"""Sources of training responses, of which a method's own is combined (`skd_lib.distillation.methods`).

Token ids go from here to the loss as they are; nothing is decoded or tokenised again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from transformers import PreTrainedModel

from skd_lib._core.seeds import derived, uniform
from skd_lib.config import DistillConfig, InterleavedConfig, Schedule
from skd_lib.distillation.batch import Rollout, Source, collate, merge
from skd_lib.distillation.methods import METHODS
from skd_lib.distillation.teacher_signal import DenseSignal, SparseSignal
from skd_lib.errors import SkdError
from skd_lib.models.heads import common_vocabulary
from skd_lib.sampling.acceptance import RULES, AcceptanceRule, student_only, teacher_only
from skd_lib.sampling.drafting import AdaptiveGamma
from skd_lib.sampling.engine import TEACHER, Sampler, Samples

if TYPE_CHECKING:
    from skd_lib.data.tokenize import TokenizedExample


class RowKey(NamedTuple):
    """Position of a row in a run: its seed and so its response depend on this alone.

    Attributes:
        step: Optimiser step, from 0.
        row: Index in the step's global batch, over all micro-batches and processes.
    """

    step: int
    row: int


Strategy = Callable[[Sequence["TokenizedExample"], Sequence[RowKey]], Rollout]
"""Makes the responses to some examples' prompts; all keys are of one optimiser step."""
Share = float | Schedule[Any] | Callable[[int], float]
"""A share of rows or steps: a number, a schedule, or a function of the optimiser step."""


class ResponseSampler(Protocol):
    """Samples one response to each prompt: `skd_lib.sampling.engine.Sampler`, or an engine with the same samples."""

    def sample(self, prompts: Sequence[list[int]], seeds: Sequence[int]) -> Samples:
        """Sample one response to each prompt; a response depends on its prompt and seed alone."""
        ...


SamplerAt = Callable[[AcceptanceRule, int], ResponseSampler]
"""Returns another engine's sampler by an acceptance rule at an optimiser step, with the student's present weights."""


@dataclass(frozen=True)
class Responses:
    """Makes the sources of responses in one training; see `rollout_for` for the attributes.

    Attributes:
        keep_teacher_states: Rollouts carry the teacher's states where it was asked while sampling.
        sampler_at: Another engine; None samples here.
    """

    student: PreTrainedModel
    teacher: PreTrainedModel | None
    distill: DistillConfig
    steps: int
    seed: int
    eos_ids: tuple[int, ...]
    pad_id: int
    max_new_tokens: int
    keep_teacher_states: bool
    sampler_at: SamplerAt | None = None

    def ground_truth(self) -> Strategy:
        """Take the examples' own responses."""

        def strategy(examples: Sequence[TokenizedExample], keys: Sequence[RowKey]) -> Rollout:  # noqa: ARG001
            prompts, responses = ([e.prompt_ids for e in examples], [e.response_ids for e in examples])
            return collate(prompts, responses, pad_id=self.pad_id, source="ground_truth", device=self.student.device)

        return strategy

    def by_student(self) -> Strategy:
        """Sample from the student."""
        return self.sampled(lambda _step: student_only(), "student")

    def by_teacher(self) -> Strategy:
        """Sample from the teacher."""
        return self.sampled(lambda _step: teacher_only(), "teacher")

    def interleaved(self) -> Strategy:
        """Let the student draft and the teacher replace, by the configured acceptance rule."""
        return self.sampled(lambda step: interleaving_rule(self.distill.sampling, step, self.steps), "interleaved")

    def sampled(self, rule_at: Callable[[int], AcceptanceRule], source: Source) -> Strategy:
        """Sample by the acceptance rule of each optimiser step."""
        settings = self.distill.sampling

        @lru_cache(maxsize=1)
        def sampler(rule: AcceptanceRule, gamma: int) -> Sampler:
            return Sampler(
                student=self.student if rule.drafts else None,
                teacher=self.teacher if rule.asks_teacher else None,
                rule=rule,
                gamma=AdaptiveGamma(gamma) if settings.adaptive_gamma else gamma,
                student_params=settings.student,
                teacher_params=settings.teacher,
                eos_ids=self.eos_ids,
                pad_id=self.pad_id,
                max_new_tokens=self.max_new_tokens,
                keep_teacher_states=self.keep_teacher_states and rule.asks_teacher,
                # An id that only one of the two padded vocabularies has stands for no token.
                vocabulary=common_vocabulary(self.student, self.teacher),
            )

        def strategy(examples: Sequence[TokenizedExample], keys: Sequence[RowKey]) -> Rollout:
            step = keys[0].step
            rule = rule_at(step)
            used: ResponseSampler
            if self.sampler_at is not None:
                used = self.sampler_at(rule, step)
            else:
                used = sampler(rule, round(value_at(settings.gamma, step, self.steps)))
            prompts = [example.prompt_ids for example in examples]
            samples = used.sample(prompts, seeds=[row_seed(self.seed, key) for key in keys])
            device = self.student.device
            rollout = collate(prompts, samples.responses(), pad_id=self.pad_id, source=source, device=device)
            by_teacher_BL, proposals_BL = rollout.by_teacher_BL.clone(), rollout.proposals_BL.clone()
            by_teacher_BL[rollout.response_mask_BL] = (samples.source_BT[samples.mask_BT] == TEACHER).to(device)
            proposals_BL[rollout.response_mask_BL] = samples.proposals_BT[samples.mask_BT].to(device)
            signals = rollout.signals
            if samples.teacher_states_BTH is not None:
                assert self.teacher is not None  # noqa: S101 - it has just been asked
                states_NH = samples.teacher_states_BTH[samples.mask_BT].to(device)
                signals = tuple(DenseSignal(states_NH, self.teacher).split(samples.lengths))
            if samples.teacher_top is not None:
                log_p_NE, ids_NK = (top_BTX[samples.mask_BT].to(device) for top_BTX in samples.teacher_top)
                rows = common_vocabulary(self.student, self.teacher)
                sparse = SparseSignal(log_p_NE, ids_NK, self.distill.temperature, rows)
                signals = tuple(sparse.split(samples.lengths))
            return replace(
                rollout,
                by_teacher_BL=by_teacher_BL,
                proposals_BL=proposals_BL,
                signals=signals,
                statistics=samples.statistics,
            )

        return strategy

    def in_some_rows(self, chosen: Strategy, share: Share) -> Strategy:
        """Use `chosen` for a share of the sequences, ground truth for the others."""
        return self._mixed(chosen, share, lambda key: row_uniform(self.seed, key))

    def in_some_steps(self, chosen: Strategy, share: Share) -> Strategy:
        """Use `chosen` in a share of the optimiser steps, ground truth in the others."""
        return self._mixed(chosen, share, lambda key: step_uniform(self.seed, key.step))

    def _mixed(self, chosen: Strategy, share: Share, draw: Callable[[RowKey], float]) -> Strategy:
        """Use `chosen` for rows whose number is below the share, ground truth for the rest.

        The choice depends on a row's key alone, not on the batch it is in. Each strategy is called once at most, with
        all of its rows.
        """
        truth = self.ground_truth()

        def strategy(examples: Sequence[TokenizedExample], keys: Sequence[RowKey]) -> Rollout:
            parts: list[Rollout] = []
            order: list[int] = []
            step = keys[0].step
            below = share(step) if callable(share) else value_at(share, step, self.steps)
            for make, wanted in ((chosen, True), (truth, False)):
                rows = [row for row, key in enumerate(keys) if (draw(key) < below) == wanted]
                if rows:
                    parts.append(make([examples[row] for row in rows], [keys[row] for row in rows]))
                    order += rows
            return parts[0] if len(parts) == 1 else merge(parts, order, self.pad_id)

        return strategy


def rollout_for(
    method: str,
    *,
    student: PreTrainedModel,
    teacher: PreTrainedModel | None,
    distill: DistillConfig,
    steps: int,
    seed: int,
    eos_ids: tuple[int, ...],
    pad_id: int,
    max_new_tokens: int,
    sampler_at: SamplerAt | None = None,
) -> Strategy:
    """Return the strategy of a method.

    Args:
        method: In `skd_lib.distillation.methods.METHODS`.
        student: The model in training.
        teacher: Needed where responses are sampled.
        distill: Its sampling section and fractions are used.
        steps: Optimiser steps of the training, over which schedules run.
        seed: The run's seed.
        eos_ids: Ids that end a response.
        pad_id: Fills rows up; may be one of `eos_ids`.
        max_new_tokens: Longest sampled response.
        sampler_at: Another engine that samples; None samples here.
    """
    entry = METHODS[method]
    if teacher is None and (entry.student_writes or entry.teacher_writes):
        raise SkdError(f"method `{method}` needs a teacher", where="distill")
    limits = (eos_ids, pad_id, max_new_tokens)
    return entry.strategy(Responses(student, teacher, distill, steps, seed, *limits, entry.uses_divergence, sampler_at))


def value_at(setting: float | Schedule[Any], step: int, steps: int) -> float:
    """Return the value of a number (itself) or of a schedule at an optimiser step: 0 has `start`, `steps - 1` `end`.

    It is a function of the step alone: a run that was interrupted goes on with the values it would have had.
    """
    if not isinstance(setting, Schedule):
        return setting
    done = min(step / max(steps - 1, 1), 1.0)
    share = done if setting.shape == "linear" else (1 - math.cos(math.pi * done)) / 2
    return float(setting.start + (setting.end - setting.start) * share)


def interleaving_rule(settings: InterleavedConfig, step: int, steps: int) -> AcceptanceRule:
    """Return the acceptance rule of the configuration at an optimiser step.

    Values that follow a schedule are rounded, so that a long training has few of them: each is a sampler of its own,
    which on a GPU captures CUDA graphs of its own.
    """
    entry = RULES[settings.rule]
    values = []
    for name in entry.settings:
        setting = getattr(settings, name)
        value = value_at(setting, step, steps)
        if isinstance(setting, Schedule):
            value = round(value) if isinstance(setting.start, int) else rounded(value)
        values.append(value)
    return entry.make(*values)


def rounded(probability: float) -> float:
    """Return a probability in two digits, or its distance from 1 where that is less.

    From 0.1 to 0.9 these are hundredths, near 0 and 1 finer ones: what is neither 0 nor 1 stays so, within 5 %.
    """
    edge = min(probability, 1 - probability)
    return round(probability, 1 - math.floor(math.log10(edge))) if edge > 0 else probability


def row_seed(seed: int, key: RowKey) -> int:
    """Return the seed of one row, 63 bits: a function of the run's seed and the row's key."""
    return derived("row", seed, *key) >> 1


def step_uniform(seed: int, step: int) -> float:
    """Return a uniform number in [0, 1) that belongs to an optimiser step."""
    return uniform("step", seed, step)


def row_uniform(seed: int, key: RowKey) -> float:
    """Return a uniform number in [0, 1) that belongs to a row, and is not the one its response is sampled with."""
    return uniform("source", seed, *key)
