"""The other ways to sample, which the engine is measured against.

They use transformers' models, caches and `generate` as they come, never the engine, and no more of either than the
job takes: where the original does more (a `generate` call for each block, say), the shorter way is measured.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, PreTrainedModel

from skd_lib.config import SamplingParams
from skd_lib.sampling.distributions import warp


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    prompts: Sequence[list[int]],
    new_tokens: int,
    params: SamplingParams,
    *,
    assistant: PreTrainedModel | None = None,
    gamma: int = 0,
) -> int:
    """Sample with `transformers.generate` and its cache, and return the number of tokens.

    With an assistant, which drafts `gamma` tokens at a time, it takes one prompt only. All responses have `new_tokens`:
    nothing ends one before. The models' generation configs are emptied.
    """
    tokens_BP, mask_BP = _left_padded(prompts, model.device)
    # What a model brings along (EOS ids, top_k, penalties) fills the gaps of what it is given: it may bring nothing.
    model.generation_config = GenerationConfig(pad_token_id=0)
    if assistant is not None:
        assistant.generation_config = GenerationConfig(
            num_assistant_tokens=gamma, num_assistant_tokens_schedule="constant", assistant_confidence_threshold=0.0
        )
    config = GenerationConfig(
        do_sample=True, temperature=params.temperature, top_p=params.top_p, top_k=0, max_new_tokens=new_tokens
    )
    out_BT = model.generate(
        input_ids=tokens_BP, attention_mask=mask_BP, generation_config=config, assistant_model=assistant
    )
    return int(out_BT.shape[0] * (out_BT.shape[1] - tokens_BP.shape[1]))


@torch.no_grad()
def token_by_token(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    k: int,
    prompts: Sequence[list[int]],
    new_tokens: int,
    student_params: SamplingParams,
    teacher_params: SamplingParams,
) -> int:
    """Sample interleaved without blocks, and return the number of tokens.

    Both models see every token, all rows step by step, cached.
    """
    tokens_BT, mask_BP = _left_padded(prompts, student.device)
    cached_student, cached_teacher = (_Cached(model, mask_BP, new_tokens) for model in (student, teacher))
    for _ in range(new_tokens):
        student_logits_BV, teacher_logits_BV = (cached(tokens_BT)[:, -1] for cached in (cached_student, cached_teacher))
        drafted_B1 = _sample(student_logits_BV, student_params)
        stands_B1 = _rank(teacher_logits_BV, drafted_B1) < k
        tokens_BT = torch.where(stands_B1, drafted_B1, _sample(teacher_logits_BV, teacher_params))
    return len(prompts) * new_tokens


@torch.no_grad()
def published_shape(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    k: int,
    gamma: int,
    prompt: list[int],
    new_tokens: int,
    student_params: SamplingParams,
    teacher_params: SamplingParams,
) -> int:
    """Sample interleaved in the shape of the published code (Xu et al. 2025), and return the number of tokens.

    One row, blocks, cached. The loss does not reuse the teacher's verification there: it asks the teacher again, for
    the whole sequence. Tested are the tokens that are kept, and ranks are those of raw logits: the cost is the same,
    the samples are right.
    """
    known_1T, mask_1P = _left_padded([prompt], student.device)
    cached_student, cached_teacher = (_Cached(model, mask_1P, new_tokens) for model in (student, teacher))
    pending_1T, written = known_1T, 0
    while written < new_tokens:
        width = min(gamma, new_tokens - written)
        fed_1T = pending_1T
        drafts: list[Tensor] = []
        for _ in range(width):
            fed_1T = _sample(cached_student(fed_1T)[:, -1], student_params)
            drafts.append(fed_1T)
        drafts_1G = torch.cat(drafts, dim=1)
        logits_GV = cached_teacher(torch.cat([pending_1T, drafts_1G[:, :-1]], dim=1), keep=width)[0]
        stands_G = (_rank(logits_GV, drafts_1G.T) < k).squeeze(1)
        accepted = int(stands_G.long().cumprod(0).sum())
        new_1T = drafts_1G[:, :accepted]
        if accepted < width:
            new_1T = torch.cat([new_1T, _sample(logits_GV[accepted : accepted + 1], teacher_params)], dim=1)
        for cached in (cached_student, cached_teacher):
            cached.forget(width - new_1T.shape[1])
        known_1T, pending_1T = torch.cat([known_1T, new_1T], dim=1), new_1T[:, -1:]
        written += new_1T.shape[1]
    teacher(input_ids=known_1T, use_cache=False)
    return written


class _Cached:
    """A model with transformers' own cache; rows are padded on the left, and all of one length."""

    def __init__(self, model: PreTrainedModel, mask_BP: Tensor, new_tokens: int) -> None:
        self.model, self.length, self.cache = model, 0, DynamicCache(config=model.config)
        self.mask_BT = torch.cat([mask_BP, mask_BP.new_ones(len(mask_BP), new_tokens)], dim=1)
        self.positions_BT = (self.mask_BT.cumsum(-1) - 1).clamp_min(0)

    def __call__(self, tokens_BT: Tensor, keep: int = 1) -> Tensor:
        """(B, keep, V) logits at the last positions of tokens that follow those seen before."""
        start, self.length = self.length, self.length + tokens_BT.shape[1]
        logits: Tensor = self.model(
            input_ids=tokens_BT,
            attention_mask=self.mask_BT[:, : self.length],
            position_ids=self.positions_BT[:, start : self.length],
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=keep,
        ).logits
        return logits

    def forget(self, tokens: int) -> None:
        """Take back the last tokens."""
        if tokens:
            self.cache.crop(-tokens)
            self.length -= tokens


def _left_padded(prompts: Sequence[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """(B, P) tokens and attention mask."""
    width = max(map(len, prompts))
    tokens = [[0] * (width - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(tokens, device=device), torch.tensor(mask, device=device)


def _sample(logits_BV: Tensor, params: SamplingParams) -> Tensor:
    """(B, 1) tokens."""
    return torch.multinomial(warp(logits_BV, params), 1)


def _rank(logits_BV: Tensor, tokens_B1: Tensor) -> Tensor:
    """(B, 1): how many tokens have a higher logit."""
    return (logits_BV > logits_BV.gather(1, tokens_B1)).sum(1, keepdim=True)
