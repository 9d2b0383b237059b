"""Interleaved sampling in vLLM's model runner V2, the default on GPUs: no step asks the device for a value.

What a row needs (its random numbers, its first position, the held-back token of its prompt) and what is noted of it lie
in tensors by request slot and position of the response. What is exchanged is as in `runner_v1`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from vllm.v1.worker.gpu.input_batch import InputBatch, get_num_sampled_and_rejected
from vllm.v1.worker.gpu.sample.logprob import compute_topk_scores
from vllm.v1.worker.gpu.sample.output import SamplerOutput
from vllm.v1.worker.gpu.sample.sampler import Sampler
from vllm.v1.worker.gpu.sample.states import NO_LOGPROBS
from vllm.v1.worker.gpu.spec_decode.rejection_sampler import RejectionSampler, gather_draft_sampled
from vllm.v1.worker.gpu.spec_decode.standalone_ar.speculator import StandaloneARSpeculator

from skd_lib.distillation.teacher_signal import SparseSignal
from skd_lib.sampling.distributions import draw, row_uniforms, warp
from skd_lib.sampling.round import CHANNELS, DRAFT, REPLACE
from skd_lib.vllm.settings import RolloutSettings, packed

_NOTHING = 2**40
"""Start of a slot whose tokens are not noted: a position that no token has."""


class Rollouts:
    """The responses in the making, one slot each (R), T positions of a response.

    Memory: `max_num_seqs` x (`length` + 1) x (41 bytes + the signal's: hidden x 2 bytes, or 8 bytes for each of the K).
    """

    def __init__(self, runner: Any, settings: RolloutSettings, length: int) -> None:
        device, rows = runner.device, runner.max_num_reqs
        self.runner, self.settings, self.length = runner, settings, length
        self.uniforms_RTC = torch.full((rows, length, CHANNELS), 0.5, dtype=torch.float64, device=device)
        self.start_R = torch.full((rows,), _NOTHING, device=device)
        self.held_back_R = torch.zeros(rows, dtype=torch.long, device=device)
        # One position more than a response has: what belongs to none is written there.
        self.notes: dict[str, Tensor] = {
            "tokens": torch.full((rows, length + 1), -1, device=device),
            "by_teacher": torch.zeros(rows, length + 1, dtype=torch.bool, device=device),
            "proposals": torch.full((rows, length + 1), -1, device=device),
        }
        self.key_of_slot: dict[int, str] = {}
        self.asked_of_slot: dict[int, dict[str, Any]] = {}
        self.finished: dict[str, dict[str, Tensor]] = {}
        self.states_MH: Tensor | None = None

    def add(self, slot: int, asked: dict[str, Any], prompt_length: int) -> None:
        """Begin a request in a slot, or go on with one that was preempted, perhaps in another slot."""
        self.asked_of_slot[slot] = asked
        key = asked.get("key") if "seed" in asked else None
        if self.key_of_slot.get(slot) not in (None, key):
            self._flush(slot)
        if key is None:
            self.key_of_slot.pop(slot, None)
            self.start_R[slot] = _NOTHING
            return
        former = next((other for other, known in self.key_of_slot.items() if known == key), None)
        if former is not None:
            self._flush(former)
        if key in self.finished:
            for name, kept in self.finished.pop(key).items():
                self.notes[name][slot] = kept.to(self.start_R.device)
        else:
            self.notes["by_teacher"][slot] = False
            self.notes["proposals"][slot] = -1
        self.key_of_slot[slot] = key
        count = min(asked["length"], self.length)
        uniforms_TC = row_uniforms(asked["seed"], asked["length"], CHANNELS)[:count]
        self.uniforms_RTC[slot, :count] = uniforms_TC.to(self.start_R.device)
        self.start_R[slot] = prompt_length + 1
        self.held_back_R[slot] = asked["last"]

    def place(self, slot: Tensor, position: Tensor) -> Tensor:
        """Return the position in the response; -1 is the held-back token."""
        return position - self.start_R[slot]

    def draws(self, slot: Tensor, place: Tensor, decision: int) -> Tensor:
        """Return the rows' random numbers for a decision."""
        return self.uniforms_RTC[slot, place.clamp(0, self.length - 1), decision]

    def note(
        self, slot: Tensor, place: Tensor, kept: Tensor, logits_LV: Tensor, rows: Tensor, **of_tokens: Tensor
    ) -> None:
        """Keep what the loss needs of tokens that stand.

        Args:
            slot: Slots of the tokens; the other tensors have its shape.
            place: Their positions in the response.
            kept: Which of them stand.
            logits_LV: The teacher's logits.
            rows: The tokens' rows of them.
            **of_tokens: tokens, by_teacher, proposals.
        """
        place = torch.where(kept & (place >= 0) & (place < self.length), place, self.length)
        for name, values in of_tokens.items():
            self.notes[name][slot, place] = values.to(self.notes[name].dtype)
        for name, values_LX in self._signal(logits_LV).items():
            if name not in self.notes:
                shape = (*self.notes["tokens"].shape, values_LX.shape[-1])
                self.notes[name] = torch.zeros(shape, dtype=values_LX.dtype, device=values_LX.device)
            self.notes[name][slot, place] = values_LX[rows]

    def _signal(self, logits_LV: Tensor) -> dict[str, Tensor]:
        if self.settings.signal == "top_k":
            top = SparseSignal.of_logits(
                logits_LV,
                self.settings.top_k,
                temperature=self.settings.temperature,
                vocabulary=self.settings.vocabulary,
            )
            return {"log_p": top.log_p_NE, "ids": top.ids_NK}
        if self.settings.signal == "states":
            assert self.states_MH is not None  # noqa: S101 - logits have just been made from them
            return {"states": self.states_MH}
        return {}

    def take(self, lengths: dict[str, int]) -> dict[str, dict[str, Any]]:
        """Return the notes on finished responses, cut to the lengths that the scheduler kept, and forget them."""
        for slot, key in list(self.key_of_slot.items()):
            if key in lengths:
                self._flush(slot)
                self.start_R[slot] = _NOTHING
        taken: dict[str, dict[str, Any]] = {}
        for key, length in lengths.items():
            notes = {name: values[:length] for name, values in self.finished.pop(key).items()}
            plain = {name: notes.pop(name).tolist() for name in ("tokens", "by_teacher", "proposals")}
            taken[key] = plain | {name: packed(values) for name, values in notes.items()}
        return taken

    def drop(self) -> None:
        """Forget all responses: those of a client that is gone. The next settings may keep another signal."""
        self.finished.clear()
        self.key_of_slot.clear()
        self.start_R.fill_(_NOTHING)
        for name in ("states", "log_p", "ids"):
            self.notes.pop(name, None)

    def scheduled(self) -> Iterator[tuple[dict[str, Any], int, int, int]]:
        """Yield what the client wants of each request of the batch, its first position, its first row, its rows."""
        batch = self.runner.execute_model_state.input_batch
        starts = batch.query_start_loc_np
        for index, slot in enumerate(batch.idx_mapping_np.tolist()[: batch.num_reqs]):
            computed, start = int(batch.num_computed_tokens_np[index]), int(starts[index])
            yield self.asked_of_slot.get(slot, {}), computed, start, int(starts[index + 1]) - start

    def _flush(self, slot: int) -> None:
        key = self.key_of_slot.pop(slot)
        self.finished[key] = {name: values[slot].to("cpu", copy=True) for name, values in self.notes.items()}


def verify(
    rollouts: Rollouts, logits_LV: Tensor, input_L: Tensor, position_L: Tensor, batch: InputBatch, width: int
) -> tuple[Tensor, Tensor]:
    """Return (B, width + 1) tokens and how many of each row stand, and note them.

    Args:
        rollouts: The responses in the making.
        logits_LV: The teacher's logits; a request's rows follow one another.
        input_L: The tokens fed at these positions: the last one that stood, then the drafts.
        position_L: The positions.
        batch: vLLM's batch.
        width: The most drafts of a request.
    """
    settings, device = rollouts.settings, logits_LV.device
    first_B, slot_B = batch.cu_num_logits.long(), batch.idx_mapping.long()
    drafted_B = first_B[1:] - first_B[:-1] - 1
    columns_S = torch.arange(width + 1, device=device)
    row_BS = (first_B[:-1].unsqueeze(1) + columns_S).clamp_max(len(logits_LV) - 1)
    is_draft_BG = columns_S[:width] < drafted_B.unsqueeze(1)
    drafts_BG = torch.where(is_draft_BG, input_L[row_BS[:, 1:]].long(), -1)
    if width:
        accepted_B = settings.stands(drafts_BG, logits_LV[row_BS[:, :width]]).long().cumprod(1).sum(1)
    else:
        accepted_B = torch.zeros_like(slot_B)
    has_drafts_B = (drafts_BG >= 0).any(1)
    # After a block that was accepted whole the teacher adds nothing; where nothing was drafted, it writes.
    is_own_B = (accepted_B < drafted_B) | ~has_drafts_B
    own_row_B = row_BS.gather(1, accepted_B.unsqueeze(1)).squeeze(1)
    own_place_B = rollouts.place(slot_B, position_L[own_row_B] + 1)
    own_B = draw(settings.replacement(logits_LV[own_row_B]), rollouts.draws(slot_B, own_place_B, REPLACE))
    own_B = torch.where(own_place_B == -1, rollouts.held_back_R[slot_B], own_B)
    padded_BS = F.pad(drafts_BG, (0, 1), value=-1)
    is_own_BS = (columns_S == accepted_B.unsqueeze(1)) & is_own_B.unsqueeze(1)
    tokens_BS = torch.where(is_own_BS, own_B.unsqueeze(1), padded_BS)
    kept_B = accepted_B + is_own_B.long()
    # Nothing of a prompt that is still being read.
    reading_B = batch.seq_lens[: len(slot_B)] < rollouts.runner.req_states.prefill_len.gpu[slot_B]
    place_BS = rollouts.place(slot_B.unsqueeze(1), position_L[row_BS] + 1)
    rollouts.note(
        slot_B.unsqueeze(1).expand_as(place_BS),
        place_BS,
        (columns_S < kept_B.unsqueeze(1)) & ~reading_B.unsqueeze(1),
        logits_LV,
        row_BS,
        tokens=tokens_BS,
        by_teacher=is_own_BS,
        proposals=torch.where(is_own_BS, padded_BS, -1),
    )
    return tokens_BS, kept_B


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
        tokens_BS, kept_B = verify(
            self.rollouts, logits, input_batch.input_ids[at], input_batch.positions[at], input_batch, 0
        )
        return _output(self, logits, input_batch, tokens_BS, kept_B)


class InterleavedRejectionSampler(RejectionSampler):
    """Keeps the drafts before the first one that the rule rejects, and the teacher's token there; adds no bonus."""

    def __call__(self, logits: Tensor, input_batch: InputBatch, *_: Any, **__: Any) -> SamplerOutput:
        """Return the tokens that stand."""
        drafts_L, position_L = gather_draft_sampled(
            input_batch.input_ids,
            input_batch.positions,
            input_batch.logits_indices,
            input_batch.expanded_idx_mapping,
            input_batch.expanded_local_pos,
            self.sampler.req_states.prefill_len.gpu,
        )
        rollouts, width = self.sampler.rollouts, self.num_speculative_steps
        tokens_BS, kept_B = verify(rollouts, logits, drafts_L, position_L, input_batch, width)
        return _output(self.sampler, logits, input_batch, tokens_BS, kept_B)


class InterleavedSpeculator(StandaloneARSpeculator):
    """Drafts at the student's temperature and top-p, from the rows' own random numbers."""

    rollouts: Rollouts

    def sample_draft(
        self, hidden_states: Tensor, sample_src_positions: Tensor, idx_mapping: Tensor, *_: Any, **__: Any
    ) -> Tensor:
        """Return one drafted token of each request."""
        logits_BV, settings = self.compute_draft_logits(hidden_states, 0), self.rollouts.settings
        slot_B = idx_mapping.long()
        place_B = self.rollouts.place(slot_B, sample_src_positions + 1)
        weights_BV = warp(logits_BV[..., : settings.vocabulary], settings.student)
        return draw(weights_BV, self.rollouts.draws(slot_B, place_B, DRAFT))


def install(runner: Any, settings: RolloutSettings, length: int) -> Rollouts:
    """Exchange the runner's three objects."""
    rollouts = Rollouts(runner, settings, length)
    runner.sampler.__class__, runner.rejection_sampler.__class__ = InterleavedSampler, InterleavedRejectionSampler
    runner.speculator.__class__ = InterleavedSpeculator
    runner.sampler.rollouts = runner.speculator.rollouts = rollouts
    return rollouts


def fits(runner: Any) -> bool:
    """Return whether the runner drafts with a draft model."""
    return type(getattr(runner, "speculator", None)) is StandaloneARSpeculator


def _output(sampler: Sampler, logits_LV: Tensor, batch: InputBatch, tokens_BS: Tensor, kept_B: Tensor) -> SamplerOutput:
    """Return vLLM's record of the tokens, with the log-probabilities that requests ask for."""
    wanted = sampler.sampling_states.max_num_logprobs(batch.idx_mapping_np)
    logprobs = None
    if wanted != NO_LOGPROBS:
        flat_L = torch.zeros(len(logits_LV), dtype=torch.long, device=logits_LV.device)
        columns_S = torch.arange(tokens_BS.shape[1], device=logits_LV.device)
        row_BS = (batch.cu_num_logits.long()[:-1].unsqueeze(1) + columns_S).clamp_max(len(logits_LV) - 1)
        kept_BS = columns_S < kept_B.unsqueeze(1)
        flat_L[row_BS[kept_BS]] = tokens_BS[kept_BS]
        expanded = batch.cu_num_logits_np.tolist() if logits_LV.shape[0] != batch.num_reqs else None
        logprobs = compute_topk_scores(logits_LV, wanted, flat_L, expanded, logits_mode=False)
    num_sampled, num_rejected = get_num_sampled_and_rejected(
        kept_B.int(), batch.seq_lens, batch.cu_num_logits, batch.idx_mapping, sampler.req_states.prefill_len.gpu
    )
    return SamplerOutput(tokens_BS, logprobs, None, num_sampled, num_rejected)
