"""Interleaved sampling as the paper states it: one sequence, one token at a time, no cache, no blocks.

`interleave` is what `skd_lib.sampling.engine` does fast, and for many sequences at once. The tests compare the two
token by token: both draw from the same uniform numbers.
"""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from skd_lib.config import SamplingParams
from skd_lib.sampling.distributions import row_uniforms
from skd_lib.sampling.samples import STUDENT, TEACHER


def probabilities(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """Return the distribution (vocabulary) that is sampled from: temperature, then top-p; greedy at temperature 0."""
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
    """Draw a token by a uniform number in [0, 1); `probs` need not add up to 1."""
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
    """Sample a response: the student proposes a token, the rule decides, the teacher replaces what it refuses.

    `parameter` is the rule's: K, the least probability, the mixture's share. Returns the response's tokens, and for
    each whether it is the student's or the teacher's.
    """
    tokens, sources = list(prompt), []
    uniforms = row_uniforms(seed, max_new_tokens + 16, 3).tolist()
    for draft_u, accept_u, replace_u in uniforms[:max_new_tokens]:
        student_logits, logits = (model(torch.tensor([tokens])).logits[0, -1] for model in (student, teacher))
        q, p = probabilities(student_logits, student_params), probabilities(logits, teacher_params)
        token = pick(q, draft_u)
        accepted = {
            "student_only": True,
            "teacher_only": False,
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
