"""Interleaved sampling in vLLM's model runner V2, the default on GPUs.

What is exchanged is as in `runner_v1`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from vllm.v1.worker.gpu.input_batch import InputBatch, get_num_sampled_and_rejected
from vllm.v1.worker.gpu.sample.output import SamplerOutput
from vllm.v1.worker.gpu.sample.sampler import Sampler
from vllm.v1.worker.gpu.spec_decode.rejection_sampler import RejectionSampler, gather_draft_sampled
from vllm.v1.worker.gpu.spec_decode.standalone_ar.speculator import StandaloneARSpeculator

from skd_lib.vllm import rollouts


class Rollouts(rollouts.Rollouts):
    """Responses by the slots that this runner gives to requests."""

    def scheduled(self) -> Iterator[tuple[dict[str, Any], int, int, int]]:
        """Yield what the client wants of each request of the batch, its first position, its first row, its rows."""
        batch = self.runner.execute_model_state.input_batch
        starts = batch.query_start_loc_np
        for index, slot in enumerate(batch.idx_mapping_np.tolist()[: batch.num_reqs]):
            computed, start = int(batch.num_computed_tokens_np[index]), int(starts[index])
            yield self.asked_of_slot.get(slot, {}), computed, start, int(starts[index + 1]) - start

    def written(self, logits_LV: Tensor, input_L: Tensor, position_L: Tensor, batch: InputBatch, width: int) -> Any:
        """Return vLLM's record of the tokens that stand.

        Args:
            logits_LV: The teacher's.
            input_L: The tokens fed at these positions: the last one that stood, then the drafts.
            position_L: The positions.
            batch: vLLM's batch.
            width: The most drafts of a request.
        """
        bounds, slot_B = batch.cu_num_logits.long(), batch.idx_mapping.long()
        prefill_len = self.runner.req_states.prefill_len.gpu
        columns_G = torch.arange(width, device=self.device)
        row_BG = bounds[:-1].unsqueeze(1) + 1 + columns_G
        drafts_BG = input_L[row_BG.clamp_max(len(input_L) - 1)].long()
        tokens_BS, kept_B = self.verify(
            logits_LV,
            drafts_BG.where(row_BG < bounds[1:].unsqueeze(1), -1),
            first_B=bounds[:-1],
            slot_B=slot_B,
            position_B=position_L[bounds[:-1]] + 1,
            reading_B=batch.seq_lens[: len(slot_B)] < prefill_len[slot_B],
        )
        num_sampled, num_rejected = get_num_sampled_and_rejected(
            kept_B.int(), batch.seq_lens, batch.cu_num_logits, batch.idx_mapping, prefill_len
        )
        return SamplerOutput(tokens_BS, None, None, num_sampled, num_rejected)


class InterleavedSampler(Sampler):
    """Serves batches in which no request has drafts."""

    rollouts: Rollouts

    def add_request(self, req_idx: int, sampling_params: Any) -> None:
        """Begin a request in a slot."""
        super().add_request(req_idx, sampling_params)
        asked = (sampling_params.extra_args or {}).get("skd") or {}
        self.rollouts.add(req_idx, asked, int(self.req_states.prompt_len.np[req_idx]))

    def __call__(self, logits: Tensor, input_batch: InputBatch) -> SamplerOutput:
        """Return each request's next token."""
        at = input_batch.logits_indices
        return self.rollouts.written(logits, input_batch.input_ids[at], input_batch.positions[at], input_batch, 0)


class InterleavedRejectionSampler(RejectionSampler):
    """Keeps the drafts before the first one that does not stand."""

    def __call__(self, logits: Tensor, input_batch: InputBatch, *_: Any, **__: Any) -> SamplerOutput:
        """Return the tokens that stand."""
        # Drafts of requests whose prompt is still being read are -1.
        input_L, position_L = gather_draft_sampled(
            input_batch.input_ids,
            input_batch.positions,
            input_batch.logits_indices,
            input_batch.expanded_idx_mapping,
            input_batch.expanded_local_pos,
            self.sampler.req_states.prefill_len.gpu,
        )
        return self.sampler.rollouts.written(logits, input_L, position_L, input_batch, self.num_speculative_steps)


class InterleavedSpeculator(StandaloneARSpeculator):
    """Drafts as the student samples."""

    rollouts: Rollouts

    def sample_draft(
        self, hidden_states: Tensor, sample_src_positions: Tensor, idx_mapping: Tensor, *_: Any, **__: Any
    ) -> Tensor:
        """Return one drafted token of each request."""
        logits_BV = self.compute_draft_logits(hidden_states, 0)
        return self.rollouts.drafts(logits_BV, idx_mapping.long(), sample_src_positions + 1)


def install(runner: Any, *, keeps: bool) -> Rollouts:
    """Exchange the classes of the runner's three objects."""
    made = Rollouts(runner, keeps=keeps)
    runner.sampler.__class__, runner.rejection_sampler.__class__ = InterleavedSampler, InterleavedRejectionSampler
    runner.speculator.__class__ = InterleavedSpeculator
    runner.sampler.rollouts = runner.speculator.rollouts = made
    return made
