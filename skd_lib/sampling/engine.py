"""Interleaved sampling: draft, verify, accept (Xu et al. 2025, section 3 and algorithm 1), batched.

The student drafts `gamma` tokens, the teacher scores the whole block in one forward pass, an acceptance rule keeps
a prefix, and the teacher's own token stands where the rule said no. `skd_lib.sampling.round` is that sentence,
`skd_lib.sampling.reference` the same one token at a time, without speed; here is what goes on around it.

Cost of a round of B rows: gamma student forwards of B tokens and one teacher forward of B x gamma tokens, each
reading the model's weights once and B x (prompt + response so far) cached positions; the head adds
B x gamma x vocabulary x hidden multiplications for each model. Rows that end leave the batch, and waiting prompts
take their places. Where the device runs out of memory, rows go on from the tokens they have, half as many at a time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor
from transformers import PreTrainedModel

from skd_lib.config import SamplingParams
from skd_lib.errors import SkdError
from skd_lib.models.heads import check_supported, common_vocabulary
from skd_lib.models.modes import evaluating
from skd_lib.sampling.acceptance import AcceptanceRule
from skd_lib.sampling.cache import RowCache, TokenCache, position_limit, prefill_positions, prefilled, stretches
from skd_lib.sampling.cuda_graphs import CudaGraphs, GraphedRounds
from skd_lib.sampling.distributions import check_params, row_uniforms
from skd_lib.sampling.drafting import AdaptiveGamma, Costs, estimated_costs
from skd_lib.sampling.round import CHANNELS, Interleaving
from skd_lib.sampling.samples import (
    STUDENT,
    TEACHER,
    BatchLimit,
    QueuedRow,
    ResponseBuffers,
    Rows,
    Samples,
    SamplingStatistics,
)

__all__ = ["STUDENT", "TEACHER", "Sampler", "Samples", "SamplingStatistics"]

_AS_TRAINED = SamplingParams()
"""Temperature 1, top-p 1: the model's own distribution."""


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
        keep_teacher_states: Return the teacher's hidden states: (max_new_tokens + a block) x hidden elements a prompt.
        vocabulary: Token ids at and above it have probability 0; None takes the smaller of the two heads, since
            padded vocabularies of one family differ in size.
        graphs: Replay rounds as CUDA graphs, on a GPU and for models whose rounds can be captured.
        stop: Called with a row's response so far after each round; True ends the row.
        batch_limit: The largest batch that fits, as far as it is known.
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
    graphs: bool = True
    stop: Callable[[list[int]], bool] | None = None
    batch_limit: BatchLimit = field(default_factory=BatchLimit, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.rule.drafts and self.student is None:
            raise SkdError(f"the acceptance rule {self.rule.name} needs a student to draft")
        if self.rule.asks_teacher and self.teacher is None:
            raise SkdError(f"the acceptance rule {self.rule.name} needs a teacher to ask")
        if self.keep_teacher_states and not self.rule.asks_teacher:
            raise SkdError(f"the acceptance rule {self.rule.name} never asks the teacher, so it has no states to keep")
        for name, count in (("max_new_tokens", self.max_new_tokens), ("gamma", self._most_drafted)):
            if count < 1:
                raise SkdError(f"`{name}` is {count}", where="sampling", hint="give it 1 or more")
        for whose, params in (("student", self.student_params), ("teacher", self.teacher_params)):
            check_params(params, where=f"sampling, {whose}")
        for model in self.models:
            check_supported(model)

    @property
    def longest_row(self) -> int | None:
        """The most tokens that a prompt and its response may have together; None where no model has a limit."""
        limits = (position_limit(model, self._block_width) for model in self.models)
        return min((limit for limit in limits if limit is not None), default=None)

    @torch.no_grad()
    def sample(
        self,
        prompts: Iterable[list[int]],
        seeds: Iterable[int],
        on_progress: Callable[[int], None] | None = None,
        on_round: Callable[[], None] | None = None,
    ) -> Samples:
        """Sample one response to each prompt; responses come in the prompts' order.

        Args:
            prompts: Token ids, ragged, at least one a prompt. All are read first: the longest decides on the memory.
            seeds: One a prompt. A response depends on its prompt and seed alone: not on the batch, on padding or on
                `gamma`.
            on_progress: Called with the number of finished responses whenever it grows.
            on_round: Called when a round has ended and its tokens are known.

        Raises:
            SkdError: a prompt is empty or does not fit a model's context together with its response, or not even one
                row fits into the device's memory.
        """
        prompts, seeds = list(prompts), list(seeds)
        output = self._allocate(prompts, seeds)
        finished = 0
        with closing(self._play(prompts, output)) as rounds:
            for ended in rounds:
                if on_round is not None:
                    on_round()
                if ended > finished and on_progress is not None:
                    on_progress(ended)
                finished = ended
        return self._finish(output)

    @torch.no_grad()
    def rounds(self, prompts: Iterable[list[int]], seeds: Iterable[int]) -> Iterator[Samples]:
        """Yield the responses so far after each round; the last are those of `sample`."""
        prompts, seeds = list(prompts), list(seeds)
        output = self._allocate(prompts, seeds)
        for _ in self._play(prompts, output):
            yield self._finish(output)

    def _play(self, prompts: Sequence[list[int]], output: ResponseBuffers) -> Generator[int, None, None]:
        """Run all rows to their ends; yield the number of finished rows after each round."""
        cleared = 0  # rows in flight when the graphs' memory was last given back
        with evaluating(*self.models):
            while tasks := output.unfinished(prompts):
                slots = min(self.batch_limit.slots or self.batch_size or len(tasks), len(tasks))
                try:
                    yield from self._sample_tasks(tasks, slots, output)
                except torch.OutOfMemoryError as error:
                    # What graphs of other shapes hold may be what is missing: as many rows once more without it.
                    if self.graphed_rounds is None or cleared == slots:
                        self.batch_limit.shrink(slots, error)
                    if self.graphed_rounds is not None:
                        self.graphed_rounds.clear()
                        cleared = slots

    def _sample_tasks(self, tasks: Sequence[QueuedRow], slots: int, output: ResponseBuffers) -> Iterator[int]:
        """Run rows to their ends, at most `slots` at a time; yield the number of finished rows after each round."""
        capacity = max(len(task.prompt) for task in tasks) + self.max_new_tokens + self._block_width
        waiting = deque(tasks)
        rows: Rows | None = None
        while waiting or rows is not None:
            free = slots - (0 if rows is None else len(rows.index_B))
            if waiting and free:
                new = self._prefill([waiting.popleft() for _ in range(min(free, len(waiting)))], capacity)
                if rows is not None:
                    rows = rows.extend(new)
                else:
                    rows = new if self.graphed_rounds is None else self.graphed_rounds.adopt(new, slots, capacity)
            assert rows is not None  # noqa: S101 - there were waiting prompts or rows
            running = self._round(rows, output)
            yield len(output.running_N) - len(waiting) - len(running)
            if len(running) < len(rows.index_B):
                rows = rows.select(torch.tensor(running, device=self._device)) if running else None

    def _round(self, rows: Rows, output: ResponseBuffers) -> list[int]:
        """Play a round and write its new tokens into the buffers; return the rows that go on."""
        slots_BS = self._next_slots(rows, self._block_width)
        uniforms_BSC = output.uniforms_NTC[rows.index_B.unsqueeze(1), slots_BS]
        gamma = self._draft_length(output.counts, len(rows.index_B))
        verdict = (self.graphed_rounds or self.interleaving.round)(rows, uniforms_BSC, gamma)

        into = (rows.index_B.unsqueeze(1), slots_BS[:, : verdict.tokens_BS.shape[1]])
        kept_BS = verdict.kept_BS
        output.tokens_NT[into] = torch.where(kept_BS, verdict.tokens_BS, self.pad_id)
        output.source_NT[into] = verdict.by_teacher_BS.to(torch.int8)
        output.proposals_NT[into] = verdict.proposals_BS
        if output.states_NTH is not None and verdict.states_BSH is not None:
            output.states_NTH[into] = torch.where(kept_BS.unsqueeze(-1), verdict.states_BSH.to(self._states_dtype), 0)
        # One transfer a round.
        figures = verdict.figures().tolist()
        tokens, by_teacher, bonus, truncated, student_fed, teacher_fed, longest, *running_B = figures
        rows.advance(verdict.length_B, verdict.last_two_B2, longest)
        running = [row for row, runs in enumerate(running_B) if runs]
        if self.stop is not None:
            running = self._not_stopped(rows, output, running)
        # Last, what counts as done: a round that ran out of memory before is run again, to the same result.
        batch, accepted, replaced = len(running_B), tokens - by_teacher, by_teacher - bonus
        output.mask_NT[into] = kept_BS
        output.truncated_N[rows.index_B] = verdict.full_B
        goes_on = set(running)
        output.running_N[rows.index_B] = torch.tensor([row in goes_on for row in range(batch)], device=self._device)
        output.counts += SamplingStatistics(
            sequences=batch - len(running),
            tokens=tokens,
            drafted=gamma * batch,
            accepted=accepted,
            replaced=replaced,
            bonus=bonus,
            tested=accepted + replaced if self.rule.accept is not None else 0,
            teacher_calls=batch if self.rule.asks_teacher else 0,
            student_calls=gamma * batch,
            teacher_positions=teacher_fed,
            student_positions=student_fed,
            truncated=truncated,
        )
        return running

    def _next_slots(self, rows: Rows, width: int) -> Tensor:
        """(B, width) places of each row's next tokens in the response."""
        written_B = rows.length_B - rows.prompt_length_B
        return written_B.unsqueeze(1) + torch.arange(width, device=self._device)

    def _not_stopped(self, rows: Rows, output: ResponseBuffers, running: list[int]) -> list[int]:
        assert self.stop is not None  # noqa: S101 - the caller checked
        written = (rows.length_B - rows.prompt_length_B).tolist()
        tokens = output.tokens_NT[rows.index_B].tolist()
        return [row for row in running if not self.stop(tokens[row][: written[row]])]

    def _prefill(self, tasks: Sequence[QueuedRow], capacity: int) -> Rows:
        """Fill both caches with all but the last known token of each row."""
        known = [task.prompt + task.response for task in tasks]
        width = max(map(len, known))
        tokens_BP = torch.tensor([row + [self.pad_id] * (width - len(row)) for row in known], device=self._device)

        def filled(model: PreTrainedModel | None, used: bool) -> RowCache | TokenCache | None:
            if model is None or not used:
                return None
            # At least one token, so that the layers are allocated; it is written again at its turn.
            return prefilled(model, tokens_BP[:, : max(width - 1, 1)], capacity)

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

    def _prefills(self, prompts: Sequence[list[int]]) -> SamplingStatistics:
        """Count the positions that `_prefill` feeds. A row that is prefilled again, for lack of memory, counts once."""

        def positions(model: PreTrainedModel | None, used: bool) -> int:
            return sum(prefill_positions(model, len(prompt)) for prompt in prompts) if model is not None and used else 0

        return SamplingStatistics(
            teacher_positions=positions(self.teacher, self.rule.asks_teacher),
            student_positions=positions(self.student, self.rule.drafts),
        )

    def _allocate(self, prompts: Sequence[list[int]], seeds: Sequence[int]) -> ResponseBuffers:
        self._check(prompts, seeds)
        count, width = len(seeds), self.max_new_tokens + self._block_width
        device = self._device
        uniforms = [row_uniforms(seed, width, CHANNELS) for seed in seeds]
        states = None
        if self.keep_teacher_states:
            assert self.teacher is not None  # noqa: S101 - checked at construction
            hidden = self.teacher.config.get_text_config(decoder=True).hidden_size
            states = torch.zeros(count, width, hidden, dtype=self._states_dtype, device=device)
        stacked = torch.stack(uniforms) if uniforms else torch.empty(0, width, CHANNELS)
        return ResponseBuffers(
            tokens_NT=torch.full((count, width), self.pad_id, device=device),
            mask_NT=torch.zeros(count, width, dtype=torch.bool, device=device),
            source_NT=torch.zeros(count, width, dtype=torch.int8, device=device),
            proposals_NT=torch.full((count, width), -1, device=device),
            truncated_N=torch.zeros(count, dtype=torch.bool, device=device),
            running_N=torch.ones(count, dtype=torch.bool, device=device),
            uniforms_NTC=stacked.float().to(device) if device.type == "mps" else stacked.to(device),
            states_NTH=states,
            counts=self._prefills(prompts),
        )

    def _finish(self, output: ResponseBuffers) -> Samples:
        """Cut the buffers to the longest response."""
        width = int(output.mask_NT.sum(-1).max()) if output.mask_NT.numel() else 0
        return Samples(
            tokens_BT=output.tokens_NT[:, :width],
            mask_BT=output.mask_NT[:, :width],
            source_BT=output.source_NT[:, :width],
            proposals_BT=output.proposals_NT[:, :width],
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
        for model in self.models:
            limit = position_limit(model, self._block_width)
            if limit is not None and longest > limit:
                stretched = " before its rotary positions stretch" if stretches(model) else ""
                raise SkdError(
                    f"the longest prompt and its response need {longest} positions, the model has {limit}{stretched}",
                    where=model.name_or_path or type(model).__name__,
                    hint="shorten the prompt (`task.max_prompt_tokens` in a run's file) or lower max_new_tokens",
                )

    @property
    def models(self) -> list[PreTrainedModel]:
        """Return the models that the rule needs."""
        used = [self.student if self.rule.drafts else None, self.teacher if self.rule.asks_teacher else None]
        return [model for model in used if model is not None]

    @property
    def _device(self) -> torch.device:
        device: torch.device = self.models[0].device
        return device

    @property
    def _vocabulary(self) -> int:
        return self.vocabulary or common_vocabulary(self.student, self.teacher)

    @property
    def _states_dtype(self) -> torch.dtype:
        assert self.teacher is not None  # noqa: S101 - there are no states without it
        dtype: torch.dtype = self.teacher.dtype
        return dtype

    @cached_property
    def interleaving(self) -> Interleaving:
        """Make the rounds, as they are without CUDA graphs."""
        return Interleaving(
            self.student,
            self.teacher,
            self.rule,
            self.student_params,
            self.teacher_params,
            self._vocabulary,
            self.max_new_tokens,
            torch.tensor(self.eos_ids, dtype=torch.long, device=self._device),
        )

    @cached_property
    def graphed_rounds(self) -> GraphedRounds | None:
        """Make the rounds as CUDA graphs; None where they cannot be captured."""
        if not (self.graphs and GraphedRounds.serve(self.models)):
            return None
        return GraphedRounds(self.interleaving.round, self.models, CudaGraphs)

    def _draft_length(self, counts: SamplingStatistics, rows: int) -> int:
        if isinstance(self.gamma, AdaptiveGamma) and self.rule.accept is not None:
            chosen = self.gamma.choose(counts, self._costs, rows=rows, bonus=self.rule.bonus)
            return min(chosen, self._longest_draft)
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
        return self._most_drafted

    @property
    def _most_drafted(self) -> int:
        """The fixed draft length, or the most that is chosen: what is drafted beyond a response's end is wasted."""
        if isinstance(self.gamma, AdaptiveGamma):
            return min(self.gamma.maximum, self.max_new_tokens)
        return self.gamma

    @property
    def _block_width(self) -> int:
        return max(self._longest_draft + self.rule.bonus, 1)
