"""Interleaved sampling: draft, verify, accept (Xu et al. 2025, section 3 and algorithm 1), batched.

The student drafts `gamma` tokens, the teacher scores the whole block in one forward pass, an acceptance rule keeps
a prefix, and the teacher's own token stands where the rule said no. `Sampler._round` is that sentence.

Cost of a round of B rows: gamma student forwards of B tokens and one teacher forward of B x gamma tokens, each
reading the model's weights once and B x (prompt + response so far) cached positions; the head adds
B x gamma x vocabulary x hidden multiplications for each model. Rows that end leave the batch, and waiting prompts
take their places. Where the device runs out of memory, rows go on from the tokens they have, half as many at a time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from skd_lib.config import SamplingParams
from skd_lib.errors import SkdError
from skd_lib.models.heads import lm_logits, vocabulary_size
from skd_lib.sampling.acceptance import AcceptanceRule, Block
from skd_lib.sampling.cache import RowCache, check_supported, forward
from skd_lib.sampling.distributions import draw, row_uniforms, warp
from skd_lib.sampling.drafting import AdaptiveGamma, Costs, estimated_costs
from skd_lib.sampling.samples import STUDENT, TEACHER, Samples, SamplingStatistics
from skd_lib.sampling.state import Output, Room, Rows, Task

__all__ = ["STUDENT", "TEACHER", "Sampler", "Samples", "SamplingStatistics"]

_AS_TRAINED = SamplingParams()
"""Temperature 1, top-p 1: the model's own distribution."""

_DRAFT, _ACCEPT, _REPLACE = range(3)
"""Channels of a row's uniform numbers: one for each decision that a position may need."""


@dataclass(frozen=True)
class Sampler:
    """Samples responses to prompts from a student, a teacher, or both interleaved.

    Models may be wrapped by PEFT, with adapters that change weights (LoRA and its like).

    Attributes:
        student: Drafts. May be None only for rules that draft nothing.
        teacher: Scores and replaces. May be None only for rules that never ask it.
        rule: Which drafts stand (`skd_lib.sampling.acceptance`).
        eos_ids: A row ends at any of these.
        pad_id: Fills rows after their end.
        max_new_tokens: Length limit of a response.
        gamma: Tokens drafted for each teacher call, the same for all or chosen each round. Results do not depend on
            it (except that `lossless` may sample other tokens of the same distribution).
        student_params: How the student samples.
        teacher_params: How the teacher samples.
        batch_size: Rows in flight; None takes all prompts at once. Where they do not fit into a GPU's memory, half as
            many are tried, in this call and the following ones.
        keep_teacher_states: Return the teacher's hidden states: max_new_tokens x hidden elements a prompt.
        vocabulary: Token ids at and above it have probability 0; None takes the smaller of the two heads, since
            padded vocabularies of one family differ in size.
        stop: Called with a row's response so far after each round; True ends the row.
    """

    student: PreTrainedModel | None
    teacher: PreTrainedModel | None
    rule: AcceptanceRule
    eos_ids: tuple[int, ...]
    pad_id: int
    max_new_tokens: int
    gamma: int | AdaptiveGamma = 5
    student_params: SamplingParams = _AS_TRAINED
    teacher_params: SamplingParams = _AS_TRAINED
    batch_size: int | None = None
    keep_teacher_states: bool = False
    vocabulary: int | None = None
    stop: Callable[[list[int]], bool] | None = None
    _room: Room = field(default_factory=Room, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.rule.drafts and self.student is None:
            raise SkdError(f"the acceptance rule {self.rule.name} needs a student to draft")
        if self.rule.asks_teacher and self.teacher is None:
            raise SkdError(f"the acceptance rule {self.rule.name} needs a teacher to ask")
        if self.keep_teacher_states and not self.rule.asks_teacher:
            raise SkdError(f"the acceptance rule {self.rule.name} never asks the teacher, so it has no states to keep")
        for model in self._models:
            check_supported(model)

    @torch.no_grad()
    def sample(
        self, prompts: Sequence[list[int]], seeds: Sequence[int], on_progress: Callable[[int], None] | None = None
    ) -> Samples:
        """Sample one response to each prompt.

        Args:
            prompts: Token ids, ragged, at least one a prompt.
            seeds: One a prompt. A response depends on its prompt and seed alone: not on the batch, on padding or on
                `gamma`.
            on_progress: Called with the number of finished responses whenever it grows.

        Raises:
            SkdError: a prompt is empty or does not fit a model's context together with its response, or not even one
                row fits into the device's memory.
        """
        self._check(prompts, seeds)
        output = self._allocate(seeds)
        with _evaluating(*self._models):
            while tasks := output.unfinished(prompts):
                slots = min(self._room.slots or self.batch_size or len(tasks), len(tasks))
                try:
                    self._sample_tasks(tasks, slots, output, on_progress)
                except torch.OutOfMemoryError as error:
                    self._room.shrink(slots, error)
        return self._finish(output)

    def _sample_tasks(
        self, tasks: Sequence[Task], slots: int, output: Output, on_progress: Callable[[int], None] | None
    ) -> None:
        """Run all rows to their ends, at most `slots` at a time."""
        capacity = max(len(task.prompt) for task in tasks) + self.max_new_tokens + self._block_width
        waiting = deque(tasks)
        rows: Rows | None = None
        while waiting or rows is not None:
            free = slots - (0 if rows is None else len(rows.index_B))
            if waiting and free:
                new = self._prefill([waiting.popleft() for _ in range(min(free, len(waiting)))], capacity)
                if rows is None:
                    rows = new
                else:
                    rows.extend(new)
            assert rows is not None  # noqa: S101 - there were waiting prompts or rows
            running = self._round(rows, output).nonzero().squeeze(-1)
            if len(running) < len(rows.index_B):
                if len(running):
                    rows.select(running)
                if on_progress is not None:
                    on_progress(len(output.running_N) - len(waiting) - len(running))
                rows = rows if len(running) else None

    def _round(self, rows: Rows, output: Output) -> Tensor:
        """Draft, verify, accept, and note the new tokens. Returns which rows go on, (B,) bool."""
        batch = torch.arange(len(rows.index_B), device=self._device)
        written_B = rows.length_B - rows.prompt_length_B
        slots_BS = written_B.unsqueeze(1) + torch.arange(self._block_width, device=self._device)
        uniforms_BSC = output.uniforms_NTC[rows.index_B.unsqueeze(1), slots_BS]

        gamma = self._draft_length(output.counts)
        drafts_BG, student_probs_BGV = self._draft(rows, gamma, uniforms_BSC[..., _DRAFT])
        drafted = drafts_BG.shape[1]
        tokens_BS, states_BSH = drafts_BG, None
        accepted_B = batch.new_full((len(batch),), drafted)
        if self.rule.asks_teacher:
            assert self.teacher is not None  # noqa: S101 - checked at construction
            states_BSH = self._verify(rows, drafts_BG)
            logits_BSV = lm_logits(self.teacher, states_BSH)[..., : self._vocabulary]
            if self.rule.accept is not None:
                block = Block(
                    drafts_BG,
                    logits_BSV[:, :drafted],
                    student_probs_BGV,
                    uniforms_BSC[:, :drafted, _ACCEPT],
                    self.teacher_params,
                )
                accepted_B = self.rule.accept(block).long().cumprod(-1).sum(-1)
            # The teacher's own token: at the first rejected position, or after the whole block.
            own_B = accepted_B.clamp(max=logits_BSV.shape[1] - 1)
            weights_BV = warp(logits_BSV[batch, own_B], self.teacher_params)
            if self.rule.correct is not None:
                q_BV = None if student_probs_BGV is None else student_probs_BGV[batch, own_B.clamp(max=drafted - 1)]
                corrected_BV = self.rule.correct(weights_BV, q_BV)
                weights_BV = torch.where((accepted_B < drafted).unsqueeze(1), corrected_BV, weights_BV)
            own_token_B = draw(weights_BV, uniforms_BSC[batch, own_B, _REPLACE])
            # A whole block without a bonus ends in the student's token: no position of it is the teacher's.
            is_own_BS = torch.arange(logits_BSV.shape[1], device=self._device) == accepted_B.unsqueeze(1)
            tokens_BS = torch.where(
                is_own_BS, own_token_B.unsqueeze(1), F.pad(drafts_BG, (0, is_own_BS.shape[1] - drafted))
            )
        return self._commit(rows, output, tokens_BS, states_BSH, accepted_B, drafted)

    def _draft(self, rows: Rows, gamma: int, uniforms_BS: Tensor) -> tuple[Tensor, Tensor | None]:
        """Let the student write `gamma` tokens: (B, G) ids and, if the rule reads them, (B, G, V) probabilities."""
        drafts: list[Tensor] = []
        probs: list[Tensor] = []
        # After a bonus the student has not seen the token before it: feed both, at their own positions.
        fed_BT = rows.last_two_B2 if self.rule.bonus else rows.last_two_B2[:, 1:]
        start_B = rows.length_B - fed_BT.shape[1]
        for step in range(gamma):
            assert self.student is not None and rows.student_cache is not None  # noqa: S101, PT018
            hidden_BTH = forward(self.student, rows.student_cache, fed_BT, start_B, rows.longest + step)
            logits_BV = lm_logits(self.student, hidden_BTH[:, -1])[..., : self._vocabulary]
            probs_BV = warp(logits_BV, self.student_params)
            token_B = draw(probs_BV, uniforms_BS[:, step])
            drafts.append(token_B)
            if self.rule.needs_student_probs:
                probs.append(probs_BV)
            start_B, fed_BT = rows.length_B + step, token_B.unsqueeze(1)
        empty = rows.index_B.new_empty(len(rows.index_B), 0)
        return torch.stack(drafts, 1) if drafts else empty, torch.stack(probs, 1) if probs else None

    def _verify(self, rows: Rows, drafts_BG: Tensor) -> Tensor:
        """One teacher forward over the block: (B, S, H) states predicting each draft, and the bonus token if any."""
        assert self.teacher is not None and rows.teacher_cache is not None  # noqa: S101, PT018
        scored = drafts_BG if self.rule.bonus else drafts_BG[:, :-1]
        fed_BS = torch.cat([rows.last_two_B2[:, 1:], scored], dim=1)
        return forward(self.teacher, rows.teacher_cache, fed_BS, rows.length_B - 1, rows.longest)

    def _commit(
        self,
        rows: Rows,
        output: Output,
        tokens_BS: Tensor,
        states_BSH: Tensor | None,
        accepted_B: Tensor,
        drafted: int,
    ) -> Tensor:
        """Append each row's new tokens up to its end, and say which rows go on."""
        width = tokens_BS.shape[1]
        offsets_S = torch.arange(width, device=self._device)
        written_B = rows.length_B - rows.prompt_length_B
        new_B = (accepted_B + 1).clamp(max=width)
        is_eos_BS = torch.isin(tokens_BS, torch.tensor(self.eos_ids, device=self._device))
        ended_before_BS = (is_eos_BS.cumsum(-1) - is_eos_BS.long()) > 0
        kept_BS = (offsets_S < new_B.unsqueeze(1)) & ~ended_before_BS
        kept_BS &= written_B.unsqueeze(1) + offsets_S < self.max_new_tokens
        by_teacher_BS = kept_BS & (offsets_S >= accepted_B.unsqueeze(1))

        into = (rows.index_B.unsqueeze(1), written_B.unsqueeze(1) + offsets_S)
        output.tokens_NT[into] = torch.where(kept_BS, tokens_BS, self.pad_id)
        output.source_NT[into] = by_teacher_BS.to(torch.int8)
        if output.states_NTH is not None and states_BSH is not None:
            output.states_NTH[into] = torch.where(kept_BS.unsqueeze(-1), states_BSH.to(output.states_NTH.dtype), 0)

        kept_B = kept_BS.sum(-1)
        known_BS = torch.cat([rows.last_two_B2[:, 1:], tokens_BS], dim=1)
        rows.last_two_B2 = known_BS.gather(1, torch.stack([kept_B - 1, kept_B], dim=1))
        rows.length_B = rows.length_B + kept_B
        ended_B = (is_eos_BS & kept_BS).any(-1)
        full_B = ~ended_B & (written_B + kept_B >= self.max_new_tokens)
        running_B = ~(ended_B | full_B)
        if self.stop is not None:
            running_B = running_B & ~self._stopped(rows, output, running_B)
        whole_B1 = (accepted_B == drafted).unsqueeze(1)
        figures = [kept_BS, by_teacher_BS, by_teacher_BS & whole_B1, full_B, running_B]
        # One transfer a round.
        *sums, rows.longest = torch.stack([*(x.sum() for x in figures), rows.length_B.max()]).tolist()
        # Last, what counts as done: a round that ran out of memory before is run again, to the same result.
        output.mask_NT[into] = kept_BS
        output.truncated_N[rows.index_B] = full_B
        output.running_N[rows.index_B] = running_B
        output.counts += self._count(sums, len(accepted_B), drafted * len(accepted_B))
        return running_B

    def _count(self, sums: list[int], batch: int, drafted: int) -> SamplingStatistics:
        tokens, by_teacher, after_whole_block, truncated, running = sums
        bonus = after_whole_block if self.rule.bonus else 0
        accepted, replaced = tokens - by_teacher, by_teacher - bonus
        return SamplingStatistics(
            sequences=batch - running,
            tokens=tokens,
            drafted=drafted,
            accepted=accepted,
            replaced=replaced,
            bonus=bonus,
            tested=accepted + replaced if self.rule.accept is not None else 0,
            teacher_calls=batch if self.rule.asks_teacher else 0,
            student_calls=drafted,
            truncated=truncated,
        )

    def _stopped(self, rows: Rows, output: Output, running_B: Tensor) -> Tensor:
        assert self.stop is not None  # noqa: S101 - the caller checked
        written = (rows.length_B - rows.prompt_length_B).tolist()
        tokens = output.tokens_NT[rows.index_B].tolist()
        stopped = [
            on and self.stop(row[:length]) for on, row, length in zip(running_B.tolist(), tokens, written, strict=True)
        ]
        return torch.tensor(stopped, device=self._device)

    def _prefill(self, tasks: Sequence[Task], capacity: int) -> Rows:
        """Fill both caches with all but the last known token of each row."""
        known = [task.prompt + task.response for task in tasks]
        width = max(map(len, known))
        tokens_BP = torch.tensor([row + [self.pad_id] * (width - len(row)) for row in known], device=self._device)
        start_B = torch.zeros(len(known), dtype=torch.long, device=self._device)

        def filled(model: PreTrainedModel | None, used: bool) -> RowCache | None:
            if model is None or not used:
                return None
            cache = RowCache(model.config.get_text_config(decoder=True), capacity)
            # At least one token, so that the layers are allocated; it is written again at its turn.
            forward(model, cache, tokens_BP[:, : max(width - 1, 1)], start_B, 0)
            return cache

        last_two = [[row[-2] if len(row) > 1 else self.pad_id, row[-1]] for row in known]
        return Rows(
            index_B=torch.tensor([task.index for task in tasks], device=self._device),
            length_B=torch.tensor([len(row) for row in known], device=self._device),
            prompt_length_B=torch.tensor([len(task.prompt) for task in tasks], device=self._device),
            last_two_B2=torch.tensor(last_two, device=self._device),
            student_cache=filled(self.student, self.rule.drafts),
            teacher_cache=filled(self.teacher, self.rule.asks_teacher),
            longest=width,
        )

    def _allocate(self, seeds: Sequence[int]) -> Output:
        count, width = len(seeds), self.max_new_tokens + self._block_width
        device = self._device
        uniforms = [row_uniforms(seed, width, 3) for seed in seeds]
        states = None
        if self.keep_teacher_states:
            assert self.teacher is not None  # noqa: S101 - checked at construction
            hidden = self.teacher.config.get_text_config(decoder=True).hidden_size
            states = torch.zeros(count, width, hidden, dtype=self.teacher.dtype, device=device)
        stacked = torch.stack(uniforms) if uniforms else torch.empty(0, width, 3)
        return Output(
            tokens_NT=torch.full((count, width), self.pad_id, device=device),
            mask_NT=torch.zeros(count, width, dtype=torch.bool, device=device),
            source_NT=torch.zeros(count, width, dtype=torch.int8, device=device),
            truncated_N=torch.zeros(count, dtype=torch.bool, device=device),
            running_N=torch.ones(count, dtype=torch.bool, device=device),
            uniforms_NTC=stacked.float().to(device) if device.type == "mps" else stacked.to(device),
            states_NTH=states,
            counts=SamplingStatistics(),
        )

    def _finish(self, output: Output) -> Samples:
        """Cut the buffers to the longest response."""
        width = int(output.mask_NT.sum(-1).max()) if output.mask_NT.numel() else 0
        return Samples(
            tokens_BT=output.tokens_NT[:, :width],
            mask_BT=output.mask_NT[:, :width],
            source_BT=output.source_NT[:, :width],
            truncated_B=output.truncated_N,
            teacher_states_BTH=None if output.states_NTH is None else output.states_NTH[:, :width],
            statistics=output.counts,
        )

    def _check(self, prompts: Sequence[list[int]], seeds: Sequence[int]) -> None:
        if len(prompts) != len(seeds):
            raise SkdError(f"{len(prompts)} prompts need as many seeds, got {len(seeds)}")
        for number, prompt in enumerate(prompts):
            if not prompt:
                raise SkdError("the prompt has no tokens", where=f"prompt {number}", hint="give it a BOS token")
        longest = max(map(len, prompts), default=0) + self.max_new_tokens
        for model in self._models:
            limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
            if limit is not None and longest > limit:
                raise SkdError(
                    f"the longest prompt and its response need {longest} positions, the model has {limit}",
                    where=model.name_or_path or type(model).__name__,
                    hint="lower max_prompt_tokens or max_new_tokens",
                )

    @property
    def _models(self) -> list[PreTrainedModel]:
        used = [self.student if self.rule.drafts else None, self.teacher if self.rule.asks_teacher else None]
        return [model for model in used if model is not None]

    @property
    def _device(self) -> torch.device:
        device: torch.device = self._models[0].device
        return device

    @property
    def _vocabulary(self) -> int:
        return self.vocabulary or min(
            vocabulary_size(model) for model in (self.student, self.teacher) if model is not None
        )

    def _draft_length(self, counts: SamplingStatistics) -> int:
        if isinstance(self.gamma, AdaptiveGamma) and self.rule.accept is not None:
            return self.gamma.choose(counts, self._costs, bonus=self.rule.bonus)
        return self._longest_draft

    @cached_property
    def _costs(self) -> Costs:
        assert self.student is not None and self.teacher is not None  # noqa: S101, PT018 - the rule tests drafts
        given = self.gamma.costs if isinstance(self.gamma, AdaptiveGamma) else None
        return given or estimated_costs(self.student, self.teacher)

    @property
    def _longest_draft(self) -> int:
        """With no teacher to ask, a longer block would only delay noticing that a row has ended."""
        if not self.rule.drafts:
            return 0
        if not self.rule.asks_teacher:
            return 1
        return self.gamma.maximum if isinstance(self.gamma, AdaptiveGamma) else self.gamma

    @property
    def _block_width(self) -> int:
        return max(self._longest_draft + self.rule.bonus, 1)


@contextmanager
def _evaluating(*models: PreTrainedModel) -> Iterator[None]:
    """Dropout off while sampling; every module's mode is put back afterwards."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training
