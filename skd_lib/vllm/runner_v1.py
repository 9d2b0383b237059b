"""Interleaved sampling in vLLM's model runner V1: on CPUs, and on GPUs with VLLM_USE_V2_MODEL_RUNNER=0.

Three objects of the runner are exchanged, no file of vLLM is touched: the rejection sampler, the sampler of requests
without drafts, and the drafter.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from vllm.v1.outputs import SamplerOutput
from vllm.v1.sample.rejection_sampler import RejectionSampler
from vllm.v1.sample.sampler import Sampler
from vllm.v1.spec_decode.draft_model import DraftModelProposer

from skd_lib.vllm import rollouts


class Rollouts(rollouts.Rollouts):
    """Responses by slots that are given out here: a request's place in this runner's batch changes."""

    slot_B: Tensor

    def __init__(self, runner: Any, *, keeps: bool = True) -> None:
        super().__init__(runner, keeps=keeps)
        self._slot_of: dict[str, int] = {}
        self._request_of = [""] * runner.max_num_reqs

    def scheduled(self) -> Iterator[tuple[dict[str, Any], int, int, int]]:
        """Yield what the client wants of each request of the batch, its first position, its first row, its rows.

        Requests that are new in the batch get a slot: of a request that is not in it.
        """
        batch, starts = self.runner.input_batch, self.runner.query_start_loc.np
        names = batch.req_ids[: batch.num_reqs]
        for name in names:
            if name not in self._slot_of:
                slot = next(s for s, other in enumerate(self._request_of) if other not in batch.req_id_to_index)
                self._slot_of.pop(self._request_of[slot], None)
                self._slot_of[name], self._request_of[slot] = slot, name
                request = self.runner.requests[name]
                asked = (request.sampling_params.extra_args or {}).get("skd") or {}
                self.add(slot, asked, len(request.prompt_token_ids))
        slots = [self._slot_of[name] for name in names]
        self.slot_B = torch.tensor(slots, device=self.device)
        for index, slot in enumerate(slots):
            computed, start = int(batch.num_computed_tokens_cpu[index]), int(starts[index])
            yield self.asked_of_slot[slot], computed, start, int(starts[index + 1]) - start

    def written(self, logits_LV: Tensor, drafts_BG: Tensor, first_B: Tensor) -> SamplerOutput:
        """Return vLLM's record of the tokens that stand; -1 comes after them."""
        batch, device = self.runner.input_batch, self.device
        requests = [self.runner.requests[name] for name in batch.req_ids[: batch.num_reqs]]
        next_ = [len(request.prompt_token_ids) + len(request.output_token_ids) for request in requests]
        reading = self.runner.discard_request_mask.np[: batch.num_reqs].tolist()
        tokens_BS, kept_B = self.verify(
            logits_LV,
            drafts_BG,
            first_B=first_B,
            slot_B=self.slot_B,
            position_B=torch.tensor(next_, device=device),
            reading_B=torch.tensor(reading, device=device),
        )
        columns_S = torch.arange(tokens_BS.shape[1], device=device)
        tokens_BS = tokens_BS.where(columns_S < kept_B.unsqueeze(1), -1)
        return SamplerOutput(sampled_token_ids=tokens_BS.int(), logprobs_tensors=None)


class InterleavedSampler(Sampler):
    """Serves batches in which no request has drafts."""

    rollouts: Rollouts

    def forward(self, logits: Tensor, *_: Any, **__: Any) -> SamplerOutput:
        """Return each request's next token."""
        rows_B = torch.arange(len(logits), device=logits.device)
        return self.rollouts.written(logits, rows_B.new_empty(len(logits), 0), rows_B)


class InterleavedRejectionSampler(RejectionSampler):
    """Keeps the drafts before the first one that does not stand."""

    rollouts: Rollouts

    def forward(self, metadata: Any, draft_probs: Any, logits: Tensor, sampling_metadata: Any) -> SamplerOutput:  # noqa: ARG002 - vLLM's signature
        """Return the tokens that stand."""
        drafted_B = torch.tensor(metadata.num_draft_tokens, device=logits.device)
        columns_G = torch.arange(metadata.max_spec_len, device=logits.device)
        drafts_N = metadata.draft_token_ids.long()
        index_BG = (drafted_B.cumsum(0) - drafted_B).unsqueeze(1) + columns_G
        # The scheduler fills a new request of which one token is left to compute (a prefix hit) with drafts of id -1.
        drafts_BG = drafts_N[index_BG.clamp_max(len(drafts_N) - 1)]
        drafts_BG = drafts_BG.where(columns_G < drafted_B.unsqueeze(1), -1)
        return self.rollouts.written(logits, drafts_BG, metadata.cu_num_sampled_tokens.long() - drafted_B - 1)


class InterleavedProposer(DraftModelProposer):
    """Drafts as the student samples."""

    rollouts: Rollouts
    _position_B: Tensor

    def set_inputs_first_pass(self, *args: Any, **kwargs: Any) -> Any:
        """Remember at which positions the drafts begin."""
        count, sampled_at, metadata = super().set_inputs_first_pass(*args, **kwargs)
        self._position_B = self.positions[sampled_at] + 1
        return count, sampled_at, metadata

    def _sample_draft_tokens(self, hidden_states: Tensor, sampling_metadata: Any) -> tuple[Tensor, None]:  # noqa: ARG002 - vLLM's signature
        tokens_B = self.rollouts.drafts(
            self.model.compute_logits(hidden_states), self.rollouts.slot_B, self._position_B
        )
        self._position_B = self._position_B + 1
        return tokens_B, None


def install(runner: Any, *, keeps: bool) -> Rollouts:
    """Exchange the runner's three objects."""
    made = Rollouts(runner, keeps=keeps)
    runner.sampler = InterleavedSampler(runner.model_config.logprobs_mode)
    runner.rejection_sampler = InterleavedRejectionSampler(runner.sampler, runner.speculative_config, runner.device)
    runner.drafter.__class__ = InterleavedProposer
    for changed in (runner.sampler, runner.rejection_sampler, runner.drafter):
        changed.rollouts = made
    return made
