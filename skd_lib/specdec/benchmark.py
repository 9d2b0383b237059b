"""The speculative-decoding benchmark: the student drafts for the teacher (Leviathan et al. 2023, arXiv 2211.17192).

Both ways of decoding run on the same engine, in the same process, in turns, on the same prompts, so that the speed-up
is that of drafting alone. Prefill is part of both.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch
from transformers import PreTrainedModel

from skd_lib.config import SamplingParams
from skd_lib.errors import SkdError
from skd_lib.events import Progress
from skd_lib.models.heads import vocabulary_size
from skd_lib.sampling.acceptance import lossless, nothing
from skd_lib.sampling.engine import Sampler, Samples, SamplingStatistics
from skd_lib.specdec.verification import verify_greedy


@dataclass(frozen=True)
class SpecdecResult:
    """How much a draft model saves its teacher.

    Attributes:
        acceptance_rate: Accepted / tested drafts.
        tokens_per_teacher_call: Block efficiency: response tokens for each teacher forward of a row, prefill left out;
            1 for the teacher alone, at most gamma + 1.
        speedup: Wall-clock seconds a token, teacher alone / speculative; medians over the repeats.
        gamma: Tokens drafted for each teacher call.
        temperature: Of both models.
        batch_size: Rows decoded together.
        prompts: Prompts in each pass.
        repeats: Timed passes of each kind.
        mismatches: Responses that are not the teacher's own; always 0, since one is an error. Only temperature 0 is
            checked.
        ties: Responses (of one pass) that differ from the teacher's own by ties within rounding.
        tokens: Response tokens of all timed speculative passes.
        teacher_only_tokens_per_second: Median over the repeats.
        speculative_tokens_per_second: Median over the repeats.
        seconds: Of the whole benchmark.
    """

    acceptance_rate: float
    tokens_per_teacher_call: float
    speedup: float
    gamma: int
    temperature: float
    batch_size: int
    prompts: int
    repeats: int
    mismatches: int
    ties: int
    tokens: int
    teacher_only_tokens_per_second: float
    speculative_tokens_per_second: float
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """As a plain dict; every value is a number."""
        return asdict(self)


def benchmark(
    teacher: PreTrainedModel,
    draft: PreTrainedModel,
    prompts: Sequence[list[int]],
    *,
    eos_ids: tuple[int, ...],
    pad_id: int,
    max_new_tokens: int,
    gamma: int = 5,
    batch_size: int = 1,
    temperature: float = 0.0,
    repeats: int = 3,
    seed: int = 0,
) -> SpecdecResult:
    """Decode the prompts with and without the draft model.

    Args:
        teacher: The model whose output is wanted.
        draft: A smaller model with the same tokenizer, on the same device.
        prompts: Token ids, ragged.
        eos_ids: Where a response ends.
        pad_id: Fills rows after their end.
        max_new_tokens: Length limit of a response.
        gamma: Tokens drafted for each teacher call.
        batch_size: Rows decoded together.
        temperature: Of both models; at 0 every response is compared with the teacher's own.
        repeats: Timed passes of each kind, after one batch of warm-up.
        seed: Every row of every pass derives its own from it.

    Raises:
        SkdError: no prompts, or a response at temperature 0 that is not the teacher's own.
    """
    if not prompts:
        raise SkdError(
            "there are no prompts to decode", where="speculative decoding", hint="give the test split examples"
        )
    started = time.perf_counter()
    params = SamplingParams(temperature=temperature)
    # The same ids are allowed with and without the draft, also where the heads are padded to different sizes.
    vocabulary = min(vocabulary_size(teacher), vocabulary_size(draft))

    def sampler(student: PreTrainedModel | None) -> Sampler:
        return Sampler(
            student=student,
            teacher=teacher,
            rule=nothing() if student is None else lossless(),
            gamma=gamma,
            student_params=params,
            teacher_params=params,
            eos_ids=eos_ids,
            pad_id=pad_id,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            vocabulary=vocabulary,
        )

    alone, speculative = sampler(None), sampler(draft)
    for decoder in (alone, speculative):
        decoder.sample(prompts[:batch_size], [seed] * len(prompts[:batch_size]))

    progress = Progress("speculative decoding", 2 * repeats)
    statistics, ties = SamplingStatistics(), 0
    seconds_alone: list[float] = []
    seconds_speculative: list[float] = []
    for repeat in range(repeats):
        seeds = [seed + repeat * len(prompts) + row for row in range(len(prompts))]
        reference, seconds = _timed(alone, prompts, seeds)
        seconds_alone.append(seconds / reference.statistics.tokens)
        progress.update(2 * repeat + 1)
        samples, seconds = _timed(speculative, prompts, seeds)
        seconds_speculative.append(seconds / samples.statistics.tokens)
        statistics += samples.statistics
        progress.update(2 * repeat + 2, acceptance_rate=statistics.acceptance_rate)
        if temperature == 0:
            ties = verify_greedy(
                teacher,
                prompts,
                _responses(samples),
                _responses(reference),
                eos_ids=eos_ids,
                max_new_tokens=max_new_tokens,
                vocabulary=vocabulary,
            )
    return SpecdecResult(
        acceptance_rate=statistics.acceptance_rate,
        tokens_per_teacher_call=statistics.tokens_per_teacher_call,
        speedup=median(seconds_alone) / median(seconds_speculative),
        gamma=gamma,
        temperature=temperature,
        batch_size=batch_size,
        prompts=len(prompts),
        repeats=repeats,
        mismatches=0,
        ties=ties,
        tokens=statistics.tokens,
        teacher_only_tokens_per_second=1 / median(seconds_alone),
        speculative_tokens_per_second=1 / median(seconds_speculative),
        seconds=time.perf_counter() - started,
    )


def _timed(sampler: Sampler, prompts: Sequence[list[int]], seeds: Sequence[int]) -> tuple[Samples, float]:
    started = time.perf_counter()
    samples = sampler.sample(prompts, seeds)
    if samples.tokens_BT.is_cuda:
        torch.cuda.synchronize(samples.tokens_BT.device)
    return samples, time.perf_counter() - started


def _responses(samples: Samples) -> list[list[int]]:
    lengths = samples.mask_BT.sum(-1).tolist()
    return [row[:length] for row, length in zip(samples.tokens_BT.tolist(), lengths, strict=True)]
