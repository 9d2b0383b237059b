"""What a speculative-decoding benchmark measures: the models, the prompts, and how they decode."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from transformers import PreTrainedModel

from skd_lib.config import SamplingParams, SpecdecConfig
from skd_lib.models.heads import vocabulary_size
from skd_lib.sampling.acceptance import lossless, nothing
from skd_lib.sampling.engine import Sampler
from skd_lib.specdec.decoding import Clock, Decoder

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """What stays the same at every temperature and batch size.

    Attributes:
        teacher: The model whose output is wanted.
        drafts: Smaller models with the same tokenizer, on the same device, by name.
        prompts: Token ids, ragged.
        eos_ids: Where a response ends.
        pad_id: Fills rows after their end.
        max_new_tokens: Length limit of a response.
        config: What to measure.
        seed: Every row of every turn derives its own from it.
    """

    teacher: PreTrainedModel
    drafts: Mapping[str, PreTrainedModel]
    prompts: Sequence[list[int]]
    eos_ids: tuple[int, ...]
    pad_id: int
    max_new_tokens: int
    config: SpecdecConfig
    seed: int = 0

    @cached_property
    def vocabulary(self) -> int:
        """The ids that are allowed: the same with and without a draft, also where heads are padded differently."""
        return min(map(vocabulary_size, (self.teacher, *self.drafts.values())))

    @property
    def gammas(self) -> list[int]:
        """All draft lengths there are figures for."""
        return sorted({self.config.gamma, *self.config.gammas})

    @cached_property
    def batch_sizes(self) -> list[int]:
        """Batch sizes that the prompts can fill."""
        fitting = [size for size in self.config.batch_sizes if size <= len(self.prompts)]
        if len(fitting) < len(self.config.batch_sizes):
            log.warning("%d prompts do not fill every batch of %s", len(self.prompts), self.config.batch_sizes)
        return fitting or [len(self.prompts)]

    @property
    def first(self) -> dict[str, list[int]]:
        """The draft lengths that are timed to begin with, for each draft model."""
        gammas = self.gammas if self.config.sweep == "all" else [self.config.gamma]
        return dict.fromkeys(self.drafts, gammas)

    def passes(self, due: Mapping[str, list[int]]) -> int:
        """How many passes these draft lengths take, the teacher's own included."""
        return self.config.repeats * (1 + sum(map(len, due.values())))

    def decoder(self, draft: PreTrainedModel | None, gamma: int, temperature: float, batch_size: int) -> Decoder:
        """The teacher with a draft model, or alone."""
        params, clock = SamplingParams(temperature=temperature), Clock()
        sampler = Sampler(
            student=draft,
            teacher=self.teacher,
            rule=nothing() if draft is None else lossless(),
            gamma=gamma,
            student_params=params,
            teacher_params=params,
            eos_ids=self.eos_ids,
            pad_id=self.pad_id,
            max_new_tokens=self.max_new_tokens,
            batch_size=batch_size,
            vocabulary=self.vocabulary,
            stop=clock,
        )
        return Decoder(sampler, clock)
