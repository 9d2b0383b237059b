"""Is greedy speculative decoding's output the teacher's own? Token by token, bar ties within rounding.

A block of gamma + 1 positions and single positions run through different matrix kernels, whose sums round differently.
Where the teacher's best tokens are closer than that rounding, either may come out. Such a tie is accepted only on
evidence: the teacher itself is asked again, and every token from the first difference on must be its best within
rounding.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from skd_lib.errors import SkdError

_HINT = (
    "the sampler or a kernel of this device is wrong for this model; run the benchmark with batch_size 1 and report it"
)


def rounding(dtype: torch.dtype) -> float:
    """How far apart two logits may be, relative to the largest at their position, to count as equal.

    Four units in the last place for half precision (bf16: 3 %, fp16: 0.4 %); 0.01 % for fp32, whose units are far
    smaller than what a deep model's sums lose.
    """
    return max(1e-4, 4 * torch.finfo(dtype).eps)


def verify_greedy(
    teacher: PreTrainedModel,
    prompts: Sequence[list[int]],
    outputs: Sequence[list[int]],
    references: Sequence[list[int]],
    *,
    eos_ids: Sequence[int],
    max_new_tokens: int,
    vocabulary: int,
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

    Returns:
        How many responses differ by ties within rounding.

    Raises:
        SkdError: a response is not the teacher's; names the prompt, counted from 0, and the position.
    """
    ties = 0
    for number, (prompt, output, reference) in enumerate(zip(prompts, outputs, references, strict=True)):
        if output != reference:
            _require_tie(teacher, prompt, output, reference, f"prompt {number}", vocabulary)
            _require_end(output, eos_ids, max_new_tokens, f"prompt {number}")
            ties += 1
    return ties


@torch.no_grad()
def _require_tie(
    teacher: PreTrainedModel, prompt: list[int], output: list[int], reference: list[int], where: str, vocabulary: int
) -> None:
    pairs = zip(output, reference, strict=False)
    position = next((at for at, (token, wanted) in enumerate(pairs) if token != wanted), None)
    if position is None:
        raise SkdError(
            f"speculative decoding ended after {len(output)} tokens, the teacher alone after {len(reference)}",
            where=f"{where}, response position {min(len(output), len(reference))}",
            hint=_HINT,
        )
    ids = torch.tensor([prompt + output], device=teacher.device)
    logits_TV = teacher(input_ids=ids).logits[0, len(prompt) - 1 : -1, :vocabulary].float()
    allowed_T = rounding(teacher.dtype) * logits_TV.abs().amax(-1)
    short_TV = logits_TV.amax(-1, keepdim=True) - logits_TV
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


def _require_end(output: list[int], eos_ids: Sequence[int], max_new_tokens: int, where: str) -> None:
    """A response that left the reference at a tie has no reference for its end."""
    ends = [at for at, token in enumerate(output) if token in eos_ids]
    end = ends[0] + 1 if ends else max_new_tokens
    if len(output) != end:
        raise SkdError(
            f"speculative decoding ended after {len(output)} tokens instead of {end}",
            where=f"{where}, response position {min(len(output), end)}",
            hint=_HINT,
        )
