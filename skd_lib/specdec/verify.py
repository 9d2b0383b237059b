"""Check that greedy speculative decoding writes the teacher's own output, up to ties within rounding.

A block of gamma + 1 positions and single positions run through different matrix kernels, whose sums round differently.
Where the teacher's best tokens are closer than that rounding, either may come out. Such a tie is accepted only on
evidence. How much rounding there is, is measured: the teacher reads responses of its own token by token and in one
forward. Then it is asked again, and every token from the first difference on must be its best within that rounding; and
all ties together may be no wider than rounding makes them, so that nothing that prefers other tokens passes for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from skd_lib.errors import SkdError
from skd_lib.models.heads import lm_logits
from skd_lib.sampling.cache import forward, prefilled

_HINT = (
    "the sampler or a kernel of this device is wrong for this model; run the benchmark with batch_size 1 and report it"
)
_RESPONSES = 4
"""Responses on which rounding is measured: each takes as many forwards as it has tokens."""


class Rounding(NamedTuple):
    """Differences between two forwards over the same tokens in the distance of the two best logits.

    `typical` is the root mean square over positions, `widest` the largest.
    """

    typical: float
    widest: float


def rounding(dtype: torch.dtype) -> float:
    """Return the distance at which two logits count as equal, relative to the largest at their position.

    Four units in the last place for half precision (bf16: 3 %, fp16: 0.4 %); 0.01 % for fp32, whose units are far
    smaller than what a deep model's sums lose.
    """
    return max(1e-4, 4 * torch.finfo(dtype).eps)


@torch.no_grad()
def measured_rounding(
    teacher: PreTrainedModel, prompts: Sequence[list[int]], responses: Sequence[list[int]], vocabulary: int
) -> Rounding:
    """Measure how the teacher's cached steps and one forward over all tokens differ, on its first few responses.

    None of the responses may be empty; ids at and above `vocabulary` were not allowed.
    """
    differences = []
    for prompt, response in list(zip(prompts, responses, strict=True))[:_RESPONSES]:
        at_once_TV = _logits(teacher, prompt, response, vocabulary)
        best_T2 = at_once_TV.topk(2).indices
        in_steps_TV = _stepped_logits(teacher, prompt, response, vocabulary)
        gaps_T, again_T = (torch.diff(logits_TV.gather(1, best_T2)) for logits_TV in (at_once_TV, in_steps_TV))
        differences.append(gaps_T - again_T)
    all_N = torch.cat(differences).flatten()
    return Rounding(typical=float(all_N.square().mean().sqrt()), widest=float(all_N.abs().max()))


def verify_greedy(
    teacher: PreTrainedModel,
    prompts: Sequence[list[int]],
    outputs: Sequence[list[int]],
    references: Sequence[list[int]],
    *,
    eos_ids: Sequence[int],
    max_new_tokens: int,
    vocabulary: int,
    measure: Callable[[], Rounding] | None = None,
) -> int:
    """Compare responses with the teacher's own.

    Args:
        teacher: Asked again about responses that differ.
        prompts: Token ids.
        outputs: Responses of speculative decoding at temperature 0, EOS included.
        references: Responses of the teacher alone.
        eos_ids: Where a response ends.
        max_new_tokens: Length limit of both.
        vocabulary: Ids at and above it were not allowed.
        measure: Measures rounding, and is asked only where responses differ; None: on these references.

    Returns:
        The number of responses that differ by ties within rounding.

    Raises:
        SkdError: a response is not the teacher's; names the prompt, counted from 0, and the position. Or the ties are
            wider than rounding makes them.
    """
    rows = zip(prompts, outputs, references, strict=True)
    differing = [(number, *row) for number, row in enumerate(rows) if row[1] != row[2]]
    if not differing:
        return 0
    for number, _, output, reference in differing:
        _require_difference(output, reference, f"prompt {number}")
    found = measure() if measure else measured_rounding(teacher, prompts, references, vocabulary)
    ties = []
    for number, prompt, output, reference in differing:
        ties.append(_require_tie(teacher, prompt, output, reference, f"prompt {number}", vocabulary, found))
        _require_end(output, eos_ids, max_new_tokens, f"prompt {number}")
    _require_narrow(ties, len(outputs), found)
    return len(differing)


class _Tie(NamedTuple):
    """A place where a response leaves the reference, in logits: its width, the best one's last place, the limit."""

    width: float
    unit: float
    allowed: float


def _require_difference(output: list[int], reference: list[int], where: str) -> None:
    """Require that neither response is the other's beginning."""
    shorter = min(len(output), len(reference))
    if output[:shorter] == reference[:shorter]:
        raise SkdError(
            f"speculative decoding ended after {len(output)} tokens, the teacher alone after {len(reference)}",
            where=f"{where}, response position {shorter}",
            hint=_HINT,
        )


@torch.no_grad()
def _require_tie(
    teacher: PreTrainedModel,
    prompt: list[int],
    output: list[int],
    reference: list[int],
    where: str,
    vocabulary: int,
    found: Rounding,
) -> _Tie:
    position = next(at for at, (token, wanted) in enumerate(zip(output, reference, strict=False)) if token != wanted)
    logits_TV = _logits(teacher, prompt, output, vocabulary)
    best_T = logits_TV.amax(-1)
    unit_T = torch.finfo(teacher.dtype).eps * best_T.abs()
    # Two logits of half precision, each a unit off, are no tie that the few measured positions need have seen.
    allowed_T = torch.maximum(2 * unit_T, torch.full_like(unit_T, 2 * found.widest))
    # Whatever was measured: a cache that is wrong would make the difference of two forwards large.
    allowed_T = torch.minimum(allowed_T, 2 * rounding(teacher.dtype) * logits_TV.abs().amax(-1))
    short_TV = best_T.unsqueeze(-1) - logits_TV
    written = [(at, output[at]) for at in range(position, len(output))]
    for at, token in [(position, reference[position]), *written]:
        if token >= vocabulary or short_TV[at, token] > allowed_T[at]:
            gap = f"{float(short_TV[at, token]):.4g}" if token < vocabulary else "infinitely"
            raise SkdError(
                f"token {token} is not the teacher's choice, its logit is {gap} below the best "
                f"(rounding explains {float(allowed_T[at]):.2g}); "
                f"speculative decoding wrote {output[position]} where the teacher alone wrote {reference[position]}",
                where=f"{where}, response position {at}",
                hint=_HINT,
            )
    width = (logits_TV[position, output[position]] - logits_TV[position, reference[position]]).abs()
    return _Tie(float(width), float(unit_T[position]), float(allowed_T[position]))


def _require_narrow(ties: Sequence[_Tie], responses: int, found: Rounding) -> None:
    """Require that ties are no wider than rounding makes them: one as its widest, many as its typical width."""
    square = sum(tie.width**2 for tie in ties)
    typical = max(found.typical, *(tie.unit / 4 for tie in ties))  # two logits, each rounded once
    if square > max(tie.allowed for tie in ties) ** 2 + 2 * len(ties) * typical**2:
        raise SkdError(
            f"{len(ties)} of {responses} responses differ from the teacher's own, first at tokens whose two logits are "
            f"{math.sqrt(square / len(ties)):.2g} apart on average (rounding explains {typical:.2g})",
            where="speculative decoding",
            hint=_HINT,
        )


def _logits(teacher: PreTrainedModel, prompt: list[int], response: list[int], vocabulary: int) -> Tensor:
    """(T, V) fp32 logits that predict each response token, from one forward."""
    ids = torch.tensor([prompt + response], device=teacher.device)
    logits_TV: Tensor = teacher(input_ids=ids).logits[0, len(prompt) - 1 : -1, :vocabulary].float()
    return logits_TV


def _stepped_logits(teacher: PreTrainedModel, prompt: list[int], response: list[int], vocabulary: int) -> Tensor:
    """Return the same from a forward for each token, as the teacher alone decodes."""
    ids_1L = torch.tensor([prompt + response], device=teacher.device)
    cache = prefilled(teacher, ids_1L[:, : max(len(prompt) - 1, 1)], ids_1L.shape[1])
    states = [
        forward(teacher, cache, ids_1L[:, at : at + 1], torch.tensor([at], device=teacher.device), at)
        for at in range(len(prompt) - 1, ids_1L.shape[1] - 1)
    ]
    return lm_logits(teacher, torch.cat(states, 1)[0])[:, :vocabulary].float()


def _require_end(output: list[int], eos_ids: Sequence[int], max_new_tokens: int, where: str) -> None:
    """Require the end of a response that left the reference at a tie, where the reference has none for it."""
    ends = [at for at, token in enumerate(output) if token in eos_ids]
    end = ends[0] + 1 if ends else max_new_tokens
    if len(output) != end:
        raise SkdError(
            f"speculative decoding ended after {len(output)} tokens instead of {end}",
            where=f"{where}, response position {min(len(output), end)}",
            hint=_HINT,
        )
