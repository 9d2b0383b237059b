"""Interleaved sampling in vLLM's model runner V1: on CPUs, and on GPUs with VLLM_USE_V2_MODEL_RUNNER=0.

Three objects of the runner are exchanged, no file of vLLM is touched: the rejection sampler (a draft stands by the
acceptance rule, else the teacher's sample, no bonus token), the sampler of requests without drafts (it gives the last
token of the prompt, which the client holds back, so that the student drafts from the first token of the response on),
and the drafter (it draws at the student's temperature and top-p). Each random number belongs to a row and a position.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from vllm.v1.outputs import SamplerOutput
from vllm.v1.sample.rejection_sampler import RejectionSampler
from vllm.v1.sample.sampler import Sampler
from vllm.v1.spec_decode.draft_model import DraftModelProposer

from skd_lib.distillation.teacher_signal import SparseSignal
from skd_lib.sampling.distributions import draw, row_uniforms, warp
from skd_lib.sampling.round import CHANNELS, DRAFT, REPLACE
from skd_lib.vllm.settings import RolloutSettings, packed


@dataclass
class Row:
    """A response in the making.

    Attributes:
        uniforms_TC: Its random numbers, by position of the response and decision.
        start: Absolute position of the response's first token.
        tokens: Tokens that stand.
        by_teacher: Which of them the teacher wrote.
        proposals: The drafts in their place; -1 where there was none.
        signal: The teacher's signal at each token, by name.
    """

    uniforms_TC: Tensor
    start: int
    tokens: list[int] = field(default_factory=list)
    by_teacher: list[bool] = field(default_factory=list)
    proposals: list[int] = field(default_factory=list)
    signal: dict[str, list[Tensor]] = field(default_factory=dict)


@dataclass(frozen=True)
class Kept:
    """A token that stands: its request in the batch, its row of logits, who wrote it, what the student had drafted."""

    request: int
    logits_row: int
    token: int
    by_teacher: bool
    proposal: int = -1


class Rollouts:
    """The responses in the making, by the key that the client gave them."""

    def __init__(self, runner: Any, settings: RolloutSettings) -> None:
        self.runner, self.settings = runner, settings
        self.rows: dict[str, Row] = {}
        self.states_MH: Tensor | None = None  # the states that the current logits were made from

    def request(self, index: int) -> Any:
        """Return vLLM's state of a request of the batch."""
        return self.runner.requests[self.runner.input_batch.req_ids[index]]

    def asked(self, index: int) -> dict[str, Any] | None:
        """Return what the client wants of a request; None for others, e.g. a warm-up."""
        extra = (self.request(index).sampling_params.extra_args or {}).get("skd")
        return extra if extra is not None and "seed" in extra else None

    def row(self, index: int) -> Row | None:
        """Return the response that a request makes."""
        if (asked := self.asked(index)) is None:
            return None
        if asked["key"] not in self.rows:
            uniforms_TC = row_uniforms(asked["seed"], asked["length"], CHANNELS)
            self.rows[asked["key"]] = Row(uniforms_TC, len(self.request(index).prompt_token_ids) + 1)
        return self.rows[asked["key"]]

    def held_back(self, index: int) -> int | None:
        """Return the last token of the prompt while the request has no output yet."""
        asked = self.asked(index)
        return asked["last"] if asked is not None and not self.request(index).output_token_ids else None

    def uniform(self, index: int, position: int, decision: int) -> float:
        """Return a row's random number for a decision at an absolute position."""
        if (row := self.row(index)) is None:
            return 0.5
        place = min(max(position - row.start, 0), len(row.uniforms_TC) - 1)
        return float(row.uniforms_TC[place, decision])

    def next_position(self, index: int) -> int:
        """Return the absolute position of the next token of a request."""
        request = self.request(index)
        return len(request.prompt_token_ids) + len(request.output_token_ids)

    def teacher_tokens(self, logits_MV: Tensor, requests: Sequence[int], accepted: Sequence[int]) -> Tensor:
        """Return (M,) tokens that stand where no draft does: the held-back one, else a sample of the teacher's.

        Args:
            logits_MV: The teacher's logits there.
            requests: Their requests.
            accepted: Drafts that stand before them.
        """
        numbers = [
            self.uniform(index, self.next_position(index) + before, REPLACE)
            for index, before in zip(requests, accepted, strict=True)
        ]
        if not numbers:
            return torch.empty(0, dtype=torch.long, device=logits_MV.device)
        uniforms_M = torch.tensor(numbers, dtype=torch.float64, device=logits_MV.device)
        tokens_M = draw(self.settings.replacement(logits_MV), uniforms_M)
        for place, index in enumerate(requests):
            if (token := self.held_back(index)) is not None:
                tokens_M[place] = token
        return tokens_M

    def writes_undrafted(self, index: int) -> bool:
        """Return whether the teacher's token is part of a response although nothing was drafted in its place."""
        reading = bool(self.runner.discard_request_mask.np[index])
        return self.row(index) is not None and self.held_back(index) is None and not reading

    def note(self, logits_MV: Tensor, kept: Sequence[Kept]) -> None:
        """Keep what the loss needs of tokens that stand."""
        kept = [entry for entry in kept if self.row(entry.request) is not None]
        if not kept:
            return
        rows_N = torch.tensor([entry.logits_row for entry in kept], device=logits_MV.device)
        signal: dict[str, Tensor] = {}
        if self.settings.signal == "top_k":
            top = SparseSignal.of_logits(
                logits_MV[rows_N],
                self.settings.top_k,
                temperature=self.settings.temperature,
                vocabulary=self.settings.vocabulary,
            )
            signal = {"log_p": top.log_p_NE.cpu(), "ids": top.ids_NK.cpu()}
        elif self.settings.signal == "states":
            assert self.states_MH is not None  # noqa: S101 - logits have just been made from them
            signal = {"states": self.states_MH[rows_N].cpu()}
        for place, entry in enumerate(kept):
            row = self.row(entry.request)
            assert row is not None  # noqa: S101 - others were left out
            row.tokens.append(entry.token)
            row.by_teacher.append(entry.by_teacher)
            row.proposals.append(entry.proposal)
            for name, values in signal.items():
                row.signal.setdefault(name, []).append(values[place])

    def take(self, lengths: dict[str, int]) -> dict[str, dict[str, Any]]:
        """Return the notes on finished responses, cut to the lengths that the scheduler kept, and forget them."""
        taken: dict[str, dict[str, Any]] = {}
        for key, length in lengths.items():
            row = self.rows.pop(key)
            taken[key] = {
                "tokens": row.tokens[:length],
                "by_teacher": row.by_teacher[:length],
                "proposals": row.proposals[:length],
            }
            taken[key] |= {name: packed(torch.stack(values[:length])) for name, values in row.signal.items()}
        return taken

    def drop(self) -> None:
        """Forget all responses: those of a client that is gone."""
        self.rows.clear()

    def scheduled(self) -> Iterator[tuple[dict[str, Any], int, int, int]]:
        """Yield what the client wants of each request of the batch, its first position, its first row, its rows."""
        starts, batch = self.runner.query_start_loc.np, self.runner.input_batch
        for index in range(batch.num_reqs):
            extra = (self.request(index).sampling_params.extra_args or {}).get("skd") or {}
            computed = int(batch.num_computed_tokens_cpu[index])
            yield extra, computed, int(starts[index]), int(starts[index + 1] - starts[index])


class InterleavedSampler(Sampler):
    """Serves batches in which no request has drafts."""

    rollouts: Rollouts

    def forward(self, logits: Tensor, sampling_metadata: Any, **_: Any) -> SamplerOutput:
        """Return each request's next token."""
        requests = range(len(logits))
        tokens_B = self.rollouts.teacher_tokens(logits, requests, [0] * len(logits))
        wrote = [index for index in requests if self.rollouts.writes_undrafted(index)]
        self.rollouts.note(logits, [Kept(index, index, int(tokens_B[index]), by_teacher=True) for index in wrote])
        logprobs = None
        if (count := sampling_metadata.max_num_logprobs) is not None:
            logprobs = self.gather_logprobs(self.compute_logprobs(logits), max(count, 0), tokens_B)
        return SamplerOutput(sampled_token_ids=tokens_B.to(torch.int32).unsqueeze(-1), logprobs_tensors=logprobs)


class InterleavedRejectionSampler(RejectionSampler):
    """Keeps the drafts before the first one that the rule rejects, and the teacher's token there; adds no bonus."""

    rollouts: Rollouts

    def forward(self, metadata: Any, draft_probs: Any, logits: Tensor, sampling_metadata: Any) -> SamplerOutput:  # noqa: ARG002 - vLLM's signature
        """Return the tokens that stand, -1 after them."""
        device, rollouts = logits.device, self.rollouts
        drafted_B = torch.tensor(metadata.num_draft_tokens, device=device)
        batch, width = len(drafted_B), metadata.max_spec_len
        row_N = torch.arange(batch, device=device).repeat_interleave(drafted_B)
        offset_N = torch.arange(len(row_N), device=device) - (drafted_B.cumsum(0) - drafted_B)[row_N]
        logits_NV = logits[metadata.target_logits_indices]
        # The scheduler fills a new request of which one token is left to compute (a prefix hit) with drafts of id -1.
        drafts_N = metadata.draft_token_ids.long()
        stands_N = rollouts.settings.stands(drafts_N.unsqueeze(1), logits_NV.unsqueeze(1)).squeeze(1)

        stands_BS = torch.zeros(batch, width, dtype=torch.bool, device=device)
        stands_BS[row_N, offset_N] = stands_N
        drafts_BS = torch.full((batch, width), -1, device=device)
        drafts_BS[row_N, offset_N] = drafts_N
        accepted_B = stands_BS.long().cumprod(1).sum(1)
        has_drafts_B = (drafts_BS >= 0).any(1)
        first_B = metadata.cu_num_sampled_tokens.long() - drafted_B - 1  # a request's first row of logits
        # After a block that was accepted whole the teacher adds nothing; where nothing was drafted, it writes.
        own_B = ((accepted_B < drafted_B) | ~has_drafts_B).nonzero().squeeze(1)
        at_B = accepted_B[own_B]
        tokens = rollouts.teacher_tokens(logits[first_B[own_B] + at_B], own_B.tolist(), at_B.tolist())
        output_BS = F.pad(drafts_BS, (0, 1), value=-1)
        output_BS = output_BS.where(torch.arange(width + 1, device=device) < accepted_B.unsqueeze(1), -1)
        output_BS[own_B, at_B] = tokens

        own = dict(zip(own_B.tolist(), tokens.tolist(), strict=True))
        accepted, first, drafts = accepted_B.tolist(), first_B.tolist(), drafts_BS.tolist()
        kept: list[Kept] = []
        for index, has_drafts in enumerate(has_drafts_B.tolist()):
            at, start = accepted[index], first[index]
            kept += [Kept(index, start + j, drafts[index][j], by_teacher=False) for j in range(at)]
            if index in own and has_drafts:
                kept.append(Kept(index, start + at, own[index], by_teacher=True, proposal=drafts[index][at]))
            elif index in own and rollouts.writes_undrafted(index):
                kept.append(Kept(index, start, own[index], by_teacher=True))
        rollouts.note(logits, kept)

        logprobs = None
        if sampling_metadata.max_num_logprobs is not None:
            logprobs = self._get_logprobs_tensors(
                sampling_metadata.max_num_logprobs,
                metadata,
                logits,
                logits_NV.float(),
                logits[metadata.bonus_logits_indices],
                output_BS,
            )
        return SamplerOutput(sampled_token_ids=output_BS.to(torch.int32), logprobs_tensors=logprobs)


class InterleavedProposer(DraftModelProposer):
    """Drafts at the student's temperature and top-p, from the rows' own random numbers."""

    rollouts: Rollouts
    _next_position: list[int]

    def set_inputs_first_pass(self, *args: Any, **kwargs: Any) -> Any:
        """Remember at which positions the drafts begin."""
        count, sampled_at, metadata = super().set_inputs_first_pass(*args, **kwargs)
        self._next_position = (self.positions[sampled_at] + 1).tolist()
        return count, sampled_at, metadata

    def _sample_draft_tokens(self, hidden_states: Tensor, sampling_metadata: Any) -> tuple[Tensor, None]:  # noqa: ARG002 - vLLM's signature
        logits_BV = self.model.compute_logits(hidden_states)
        numbers = [self.rollouts.uniform(i, position, DRAFT) for i, position in enumerate(self._next_position)]
        self._next_position = [position + 1 for position in self._next_position]
        uniforms_B = torch.tensor(numbers, dtype=torch.float64, device=logits_BV.device)
        settings = self.rollouts.settings
        return draw(warp(logits_BV[..., : settings.vocabulary], settings.student), uniforms_B), None


def install(runner: Any, settings: RolloutSettings, length: int) -> Rollouts:  # noqa: ARG001 - V2's tensors have a length
    """Exchange the runner's three objects."""
    rollouts = Rollouts(runner, settings)
    sampler = InterleavedSampler(runner.model_config.logprobs_mode)
    rejection = InterleavedRejectionSampler(sampler, runner.speculative_config, runner.device)
    runner.sampler, runner.rejection_sampler = sampler, rejection
    runner.drafter.__class__ = InterleavedProposer
    for changed in (sampler, rejection, runner.drafter):
        changed.rollouts = rollouts
    return rollouts


def fits(runner: Any) -> bool:
    """Return whether the runner drafts with a draft model."""
    return isinstance(getattr(runner, "drafter", None), DraftModelProposer) and not runner.use_async_scheduling
