"""The responses in the making, and who writes their next tokens: what both of vLLM's model runners share.

What a row needs (its random numbers, its first position, the held-back token of its prompt) and what is noted of it lie
in tensors by slot and position of the response. Nothing here asks the device for a value while tokens are sampled.

A draft stands by the acceptance rule, else the teacher's sample stands in its place. After a block that was accepted
whole the teacher adds nothing. The client holds the last token of the prompt back, and it is "sampled" first, so that
the student drafts from the first token of the response on.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from skd_lib.distillation.teacher_signal import SparseSignal
from skd_lib.sampling.distributions import draw, row_uniforms, warp
from skd_lib.sampling.round import CHANNELS, DRAFT, REPLACE
from skd_lib.vllm.settings import RolloutSettings, packed

_NOTHING = 2**40
"""Start of a slot whose tokens are not noted: a position that no token has."""
_PLAIN = ("tokens", "by_teacher", "proposals")
"""What is noted of each token besides the teacher's signal."""


class Rollouts:
    """Responses, one slot each (R), T positions of a response.

    Memory: slots x (length + 1) x (41 bytes + the signal's: hidden x 2 bytes, or 8 bytes for each of the K).

    Args:
        runner: vLLM's model runner.
        keeps: False on the other ranks of a tensor-parallel server: they sample the same tokens and note nothing.
    """

    settings: RolloutSettings
    length: int

    def __init__(self, runner: Any, *, keeps: bool = True) -> None:
        self.runner, self.keeps = runner, keeps
        self.device: torch.device = runner.device
        self.start_R = torch.full((runner.max_num_reqs,), _NOTHING, device=self.device)
        self.held_back_R = torch.zeros(runner.max_num_reqs, dtype=torch.long, device=self.device)
        self.asked_of_slot: dict[int, dict[str, Any]] = {}
        self.states_MH: Tensor | None = None  # the teacher's states that the current logits were made from

    def begin(self, settings: RolloutSettings, length: int) -> None:
        """Forget all responses, those of a client that is gone, and make room for longer or shorter ones."""
        rows = len(self.start_R)
        self.length = length
        self.notes: dict[str, Tensor] = {}
        self.key_of_slot: dict[int, str] = {}
        self.finished: dict[str, dict[str, Tensor]] = {}
        self.start_R.fill_(_NOTHING)
        self.uniforms_RTC = torch.full((rows, length, CHANNELS), 0.5, dtype=torch.float64, device=self.device)
        self.use(settings)

    def use(self, settings: RolloutSettings) -> None:
        """Sample by other settings from the next round on."""
        self.settings = settings
        if not self.keeps:
            return
        config = self.runner.model_config
        states_1H = torch.zeros(1, config.get_hidden_size(), dtype=config.dtype, device=self.device)
        signal = self._signal(torch.zeros(1, settings.vocabulary, device=self.device), states_1H)
        tokens_1 = torch.zeros(1, dtype=torch.long, device=self.device)
        examples = {"tokens": tokens_1, "by_teacher": tokens_1.bool(), "proposals": tokens_1, **signal}
        # One position more than a response has: what belongs to none is written there.
        shapes = {name: (len(self.start_R), self.length + 1, *one.shape[1:]) for name, one in examples.items()}
        self.notes = {name: self.notes[name] for name in shapes if name in self.notes}
        for name, shape in shapes.items():
            if name not in self.notes or self.notes[name].shape != shape:
                self.notes[name] = torch.zeros(shape, dtype=examples[name].dtype, device=self.device)

    def add(self, slot: int, asked: dict[str, Any], prompt_length: int) -> None:
        """Begin a request in a slot, or go on with one that was preempted, perhaps in another slot."""
        self.asked_of_slot[slot] = asked
        key = asked.get("key") if "seed" in asked else None
        if self.key_of_slot.get(slot) not in (None, key):
            self._flush(slot)
        if key is None:
            self.start_R[slot] = _NOTHING
            return
        former = next((other for other, known in self.key_of_slot.items() if known == key), None)
        if former is not None:
            self._flush(former)
        for name, kept in self.finished.pop(key, {}).items():
            self.notes[name][slot] = kept.to(self.device)
        self.key_of_slot[slot] = key
        uniforms_TC = row_uniforms(asked["seed"], asked["length"], CHANNELS)[: self.length]
        self.uniforms_RTC[slot, : len(uniforms_TC)] = uniforms_TC.to(self.device)
        self.start_R[slot] = prompt_length + 1
        self.held_back_R[slot] = asked["last"]

    def drafts(self, logits_BV: Tensor, slot_B: Tensor, position_B: Tensor) -> Tensor:
        """Return one token of the student's for each row: at its temperature and top-p, from the row's own numbers."""
        weights_BV = warp(logits_BV[..., : self.settings.vocabulary], self.settings.student)
        return draw(weights_BV, self._uniforms(slot_B, position_B - self.start_R[slot_B], DRAFT))

    def verify(
        self,
        logits_LV: Tensor,
        drafts_BG: Tensor,
        *,
        first_B: Tensor,
        slot_B: Tensor,
        position_B: Tensor,
        reading_B: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Return (B, G + 1) tokens and how many of each row stand, and note them.

        Args:
            logits_LV: The teacher's; a request's rows follow one another.
            drafts_BG: Drafted tokens; -1 where there is none.
            first_B: Each request's first row of logits.
            slot_B: Its slot.
            position_B: Position of the token that this row of logits is about.
            reading_B: True where a part of the prompt is still to be read: nothing is noted.
        """
        settings = self.settings
        columns_S = torch.arange(drafts_BG.shape[1] + 1, device=self.device)
        row_BS = (first_B.unsqueeze(1) + columns_S).clamp_max(len(logits_LV) - 1)
        place_BS = (position_B - self.start_R[slot_B]).unsqueeze(1) + columns_S
        drafted_B = (drafts_BG >= 0).sum(1)
        accepted_B = drafted_B
        if drafts_BG.shape[1]:
            accepted_B = settings.stands(drafts_BG, logits_LV[row_BS[:, :-1]]).long().cumprod(1).sum(1)
        # After a block that was accepted whole the teacher adds nothing; where nothing was drafted, it writes.
        is_own_B = (accepted_B < drafted_B) | (drafted_B == 0)
        own_row_B, own_place_B = (x.gather(1, accepted_B.unsqueeze(1)).squeeze(1) for x in (row_BS, place_BS))
        own_B = draw(settings.replacement(logits_LV[own_row_B]), self._uniforms(slot_B, own_place_B, REPLACE))
        own_B = torch.where(own_place_B == -1, self.held_back_R[slot_B], own_B)
        padded_BS = F.pad(drafts_BG, (0, 1), value=-1)
        is_own_BS = (columns_S == accepted_B.unsqueeze(1)) & is_own_B.unsqueeze(1)
        tokens_BS = torch.where(is_own_BS, own_B.unsqueeze(1), padded_BS)
        kept_B = accepted_B + is_own_B.long()
        if self.keeps:
            proposals_BS = torch.where(is_own_BS, padded_BS, -1)
            plain = {"tokens": tokens_BS, "by_teacher": is_own_BS, "proposals": proposals_BS}
            signal = {name: values[row_BS] for name, values in self._signal(logits_LV, self.states_MH).items()}
            kept_BS = (columns_S < kept_B.unsqueeze(1)) & ~reading_B.unsqueeze(1)
            kept_BS &= (place_BS >= 0) & (place_BS < self.length)
            place_BS = torch.where(kept_BS, place_BS, self.length)
            for name, values in {**plain, **signal}.items():
                self.notes[name][slot_B.unsqueeze(1), place_BS] = values.to(self.notes[name].dtype)
        return tokens_BS, kept_B

    def take(self, lengths: dict[str, int]) -> dict[str, dict[str, Any]]:
        """Return the notes on finished responses, cut to the lengths that the scheduler kept, and forget them."""
        for slot, key in list(self.key_of_slot.items()):
            if key in lengths:
                self._flush(slot)
                self.start_R[slot] = _NOTHING
        taken = {key: (self.finished.pop(key), length) for key, length in lengths.items()}
        return {
            key: {
                name: values[:length].tolist() if name in _PLAIN else packed(values[:length])
                for name, values in notes.items()
            }
            for key, (notes, length) in taken.items()
        }

    def _uniforms(self, slot_B: Tensor, place_B: Tensor, decision: int) -> Tensor:
        return self.uniforms_RTC[slot_B, place_B.clamp(0, self.length - 1), decision]

    def _signal(self, logits_LV: Tensor, states_LH: Tensor | None) -> dict[str, Tensor]:
        """Return what is kept of the teacher at each row, by name."""
        settings = self.settings
        if settings.signal == "top_k":
            top = SparseSignal.of_logits(
                logits_LV, settings.top_k, temperature=settings.temperature, vocabulary=settings.vocabulary
            )
            return {"log_p": top.log_p_NE, "ids": top.ids_NK}
        if settings.signal == "states":
            assert states_LH is not None  # noqa: S101 - logits have just been made from them
            return {"states": states_LH}
        return {}

    def _flush(self, slot: int) -> None:
        """Bring what is noted in a slot to the CPU."""
        key = self.key_of_slot.pop(slot)
        self.finished[key] = {name: values[slot].to("cpu", copy=True) for name, values in self.notes.items()}
