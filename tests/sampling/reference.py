"""Interleaved sampling as the paper states it: one sequence, one token at a time, no cache, no blocks.

It draws from the same uniform numbers as the engine, so that samples too can be compared token by token.
"""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from skd_lib.config import SamplingParams
from skd_lib.sampling.distributions import row_uniforms
from skd_lib.sampling.samples import STUDENT, TEACHER


def probabilities(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    if params.temperature == 0:
        return torch.nn.functional.one_hot(logits.argmax(), len(logits)).double()
    probs = torch.softmax(logits / params.temperature, -1).double()
    order = probs.argsort(descending=True, stable=True)
    kept = torch.zeros_like(probs)
    mass = 0.0
    for token in order:
        if mass >= params.top_p:
            break
        kept[token] = probs[token]
        mass += float(probs[token])
    return kept / kept.sum()


def pick(probs: torch.Tensor, uniform: float) -> int:
    return int((probs.cumsum(-1) <= uniform * probs.sum()).sum())


@torch.no_grad()
def interleave(
    student: PreTrainedModel | None,
    teacher: PreTrainedModel | None,
    k: int | None,
    prompt: list[int],
    seed: int,
    *,
    max_new_tokens: int,
    eos_ids: tuple[int, ...],
    student_params: SamplingParams,
    teacher_params: SamplingParams,
) -> tuple[list[int], list[int]]:
    """Tokens and their sources. `k` None accepts everything; no student accepts nothing."""
    tokens, sources = list(prompt), []
    uniforms = row_uniforms(seed, max_new_tokens + 16, 3)
    for position in range(max_new_tokens):
        proposal = None
        if student is not None:
            q = probabilities(student(torch.tensor([tokens])).logits[0, -1], student_params)
            proposal = pick(q, float(uniforms[position, 0]))
        source = STUDENT
        if teacher is not None:
            logits = teacher(torch.tensor([tokens])).logits[0, -1]
            if proposal is None or (k is not None and int((logits > logits[proposal]).sum()) >= k):
                proposal, source = pick(probabilities(logits, teacher_params), float(uniforms[position, 2])), TEACHER
        assert proposal is not None
        tokens.append(proposal)
        sources.append(source)
        if proposal in eos_ids:
            break
    return tokens[len(prompt) :], sources
