"""One round of interleaved sampling: draft, verify, accept (Xu et al. 2025, algorithm 1), batched.

`Interleaving.round` is a function of the rows and their uniform numbers, of static shapes, that never asks the device
for a value: so a GPU can replay it as one CUDA graph (`skd_lib.sampling.cuda_graphs`). What it writes besides, into the
caches at and after a row's last token, is written again by whatever comes next.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from skd_lib.config import SamplingParams
from skd_lib.errors import SkdError
from skd_lib.models.heads import lm_logits
from skd_lib.sampling.acceptance import AcceptanceRule, Block
from skd_lib.sampling.cache import forward, positions_read
from skd_lib.sampling.distributions import draw, warp
from skd_lib.sampling.samples import Rows

CHANNELS = 3
"""Uniform numbers that a position may need, one for each decision."""
DRAFT, ACCEPT, REPLACE = range(CHANNELS)


@dataclass(frozen=True)
class Verdict:
    """The result of a round, for S tokens a row: those that it keeps come first.

    Attributes:
        tokens_BS: Token ids.
        kept_BS: Which of them the response gets: those up to the rejected one, up to its end.
        by_teacher_BS: Which of the kept are the teacher's.
        bonus_BS: Which of these follow a whole accepted block.
        proposals_BS: The student's token in whose place a teacher's stands; -1 where there is none.
        states_BSH: The teacher's states that predict the tokens; None if it was not asked.
        length_B: The rows' new lengths.
        last_two_B2: Their last two tokens.
        full_B: Which rows ended by the length limit.
        running_B: Which rows go on.
        fed_B2: Positions of each row that went through the student's decoder and through the teacher's.
    """

    tokens_BS: Tensor
    kept_BS: Tensor
    by_teacher_BS: Tensor
    bonus_BS: Tensor
    proposals_BS: Tensor
    states_BSH: Tensor | None
    length_B: Tensor
    last_two_B2: Tensor
    full_B: Tensor
    running_B: Tensor
    fed_B2: Tensor

    def figures(self) -> Tensor:
        """(7 + B) integers for the host.

        Kept, teacher's, bonus and truncated; positions fed to the student and to the teacher; the longest row; which
        rows go on.
        """
        counted = (self.kept_BS, self.by_teacher_BS, self.bonus_BS, self.full_B, *self.fed_B2.unbind(1))
        return torch.cat([torch.stack([*(x.sum() for x in counted), self.length_B.max()]), self.running_B.long()])


@dataclass(frozen=True)
class Interleaving:
    """The models, the acceptance rule and the sampling parameters of rounds; see `skd_lib.sampling.engine.Sampler`."""

    student: PreTrainedModel | None
    teacher: PreTrainedModel | None
    rule: AcceptanceRule
    student_params: SamplingParams
    teacher_params: SamplingParams
    vocabulary: int
    max_new_tokens: int
    eos_ids: Tensor

    def round(self, rows: Rows, uniforms_BSC: Tensor, gamma: int) -> Verdict:
        """Draft `gamma` tokens, let the teacher score them in one forward pass, keep what the rule accepts."""
        drafts_BG, student_probs_BGV, student_fed = self._draft(rows, gamma, uniforms_BSC[..., DRAFT])
        if not self.rule.asks_teacher:
            all_B = torch.full_like(rows.length_B, gamma)
            return self._cut_at_end(rows, drafts_BG, all_B, drafts_BG, None, (student_fed, 0))
        assert self.teacher is not None  # noqa: S101 - the rule asks it
        batch = torch.arange(len(drafts_BG), device=drafts_BG.device)
        states_BSH, teacher_fed = self._verify(rows, drafts_BG)
        logits_BSV = lm_logits(self.teacher, states_BSH)[..., : self.vocabulary]
        accepted_B = torch.zeros_like(batch)
        if self.rule.accept is not None:
            uniforms_BG = uniforms_BSC[:, :gamma, ACCEPT]
            block = Block(drafts_BG, logits_BSV[:, :gamma], student_probs_BGV, uniforms_BG, self.teacher_params)
            accepted_BG = self.rule.accept(block)
            self._check_shape("accept", accepted_BG, drafts_BG)
            accepted_B = accepted_BG.long().cumprod(-1).sum(-1)

        # The teacher's own token: at the first rejected position, or after the whole block.
        own_B = accepted_B.clamp(max=logits_BSV.shape[1] - 1)
        weights_BV = warp(logits_BSV[batch, own_B], self.teacher_params)
        if self.rule.correct is not None:
            q_BV = None if student_probs_BGV is None else student_probs_BGV[batch, own_B.clamp(max=gamma - 1)]
            corrected_BV = self.rule.correct(weights_BV, q_BV)
            self._check_shape("correct", corrected_BV, weights_BV)
            weights_BV = torch.where((accepted_B < gamma).unsqueeze(1), corrected_BV, weights_BV)
        own_token_B = draw(weights_BV, uniforms_BSC[batch, own_B, REPLACE])
        # A whole block without a bonus ends in the student's token: no position of it is the teacher's.
        is_own_BS = torch.arange(logits_BSV.shape[1], device=batch.device) == accepted_B.unsqueeze(1)
        drafts_BS = F.pad(drafts_BG, (0, logits_BSV.shape[1] - gamma), value=-1)
        tokens_BS = torch.where(is_own_BS, own_token_B.unsqueeze(1), drafts_BS)
        return self._cut_at_end(rows, tokens_BS, accepted_B, drafts_BS, states_BSH, (student_fed, teacher_fed))

    def _check_shape(self, function: str, returned: Tensor, wanted: Tensor) -> None:
        if returned.shape != wanted.shape:
            what = f"`{function}` must return the shape {tuple(wanted.shape)}, got {tuple(returned.shape)}"
            hint = "accept: one value for each drafted token; correct: one weight for each token of the vocabulary"
            raise SkdError(what, where=f"acceptance rule {self.rule.name}", hint=hint)

    def _draft(self, rows: Rows, gamma: int, uniforms_BS: Tensor) -> tuple[Tensor, Tensor | None, int | Tensor]:
        """Let the student write `gamma` tokens.

        Returns:
            (B, G) ids; (B, G, V) probabilities, if the rule reads them; the positions of each row that were fed.
        """
        drafts: list[Tensor] = []
        probs: list[Tensor] = []
        fed: int | Tensor = 0
        # After a bonus the student has not seen the token before it: feed both, at their own positions.
        fed_BT = rows.last_two_B2 if self.rule.bonus else rows.last_two_B2[:, 1:]
        start_B = rows.length_B - fed_BT.shape[1]
        for step in range(gamma):
            assert self.student is not None and rows.student_cache is not None  # noqa: S101, PT018
            hidden_BTH = forward(self.student, rows.student_cache, fed_BT, start_B, rows.longest + step)
            fed += positions_read(self.student, rows.student_cache, start_B, fed_BT.shape[1])
            logits_BV = lm_logits(self.student, hidden_BTH[:, -1])[..., : self.vocabulary]
            probs_BV = warp(logits_BV, self.student_params)
            token_B = draw(probs_BV, uniforms_BS[:, step])
            drafts.append(token_B)
            if self.rule.needs_student_probs:
                probs.append(probs_BV)
            start_B, fed_BT = rows.length_B + step, token_B.unsqueeze(1)
        empty = rows.length_B.new_empty(len(rows.length_B), 0)
        return torch.stack(drafts, 1) if drafts else empty, torch.stack(probs, 1) if probs else None, fed

    def _verify(self, rows: Rows, drafts_BG: Tensor) -> tuple[Tensor, int | Tensor]:
        """Run the teacher once over the block.

        Returns:
            (B, S, H) states predicting each draft, and the bonus token if any; the positions of each row that were fed.
        """
        assert self.teacher is not None and rows.teacher_cache is not None  # noqa: S101, PT018
        scored = drafts_BG if self.rule.bonus else drafts_BG[:, :-1]
        fed_BS = torch.cat([rows.last_two_B2[:, 1:], scored], dim=1)
        start_B = rows.length_B - 1
        states_BSH = forward(self.teacher, rows.teacher_cache, fed_BS, start_B, rows.longest)
        return states_BSH, positions_read(self.teacher, rows.teacher_cache, start_B, fed_BS.shape[1])

    def _cut_at_end(
        self,
        rows: Rows,
        tokens_BS: Tensor,
        accepted_B: Tensor,
        drafts_BS: Tensor,
        states_BSH: Tensor | None,
        fed: tuple[int | Tensor, int | Tensor],
    ) -> Verdict:
        """Cut each row's new tokens at its end."""
        width = tokens_BS.shape[1]
        offsets_S = torch.arange(width, device=tokens_BS.device)
        written_B = rows.length_B - rows.prompt_length_B
        is_eos_BS = (tokens_BS.unsqueeze(-1) == self.eos_ids).any(-1)  # `isin` may ask the device
        ended_before_BS = (is_eos_BS.cumsum(-1) - is_eos_BS.long()) > 0
        kept_BS = (offsets_S <= accepted_B.unsqueeze(1)) & ~ended_before_BS
        kept_BS &= written_B.unsqueeze(1) + offsets_S < self.max_new_tokens
        by_teacher_BS = kept_BS & (offsets_S >= accepted_B.unsqueeze(1))
        kept_B = kept_BS.sum(-1)
        known_BS = torch.cat([rows.last_two_B2[:, 1:], tokens_BS], dim=1)
        ended_B = (is_eos_BS & kept_BS).any(-1)
        full_B = ~ended_B & (written_B + kept_B >= self.max_new_tokens)
        return Verdict(
            tokens_BS=tokens_BS,
            kept_BS=kept_BS,
            by_teacher_BS=by_teacher_BS,
            bonus_BS=by_teacher_BS & (drafts_BS < 0) if self.rule.drafts else torch.zeros_like(by_teacher_BS),
            proposals_BS=torch.where(by_teacher_BS, drafts_BS, -1),
            states_BSH=states_BSH,
            length_B=rows.length_B + kept_B,
            last_two_B2=known_BS.gather(1, torch.stack([kept_B - 1, kept_B], dim=1)),
            full_B=full_B,
            running_B=~(ended_B | full_B),
            fed_B2=torch.stack([torch.zeros_like(rows.length_B) + each for each in fed], dim=1),
        )
