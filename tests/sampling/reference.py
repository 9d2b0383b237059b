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
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    rule: str,
    parameter: float,
    prompt: list[int],
    seed: int,
    *,
    max_new_tokens: int,
    eos_ids: tuple[int, ...],
    student_params: SamplingParams,
    teacher_params: SamplingParams,
) -> tuple[list[int], list[int]]:
    """Tokens and their sources, one at a time: the student proposes, the rule decides, the teacher replaces."""
    tokens, sources = list(prompt), []
    uniforms = row_uniforms(seed, max_new_tokens + 16, 3).tolist()
    for draft_u, accept_u, replace_u in uniforms[:max_new_tokens]:
        student_logits, logits = (model(torch.tensor([tokens])).logits[0, -1] for model in (student, teacher))
        q, p = probabilities(student_logits, student_params), probabilities(logits, teacher_params)
        token = pick(q, draft_u)
        accepted = {
            "everything": True,
            "nothing": False,
            "top_k": int((logits > logits[token]).sum()) < parameter,
            "min_prob": float(torch.softmax(logits, -1)[token]) >= parameter,
            "lossless": accept_u * q[token] < p[token],
            "mixture": accept_u * q[token] < (1 - parameter) * q[token] + parameter * p[token],
        }[rule]
        if not accepted:
            residual = (p - q).clamp_min(0)
            weights = {"lossless": residual, "mixture": residual}.get(rule, p)
            token = int(logits.argmax()) if rule == "min_prob" else pick(weights, replace_u)
        tokens.append(token)
        sources.append(STUDENT if accepted else TEACHER)
        if token in eos_ids:
            break
    return tokens[len(prompt) :], sources
