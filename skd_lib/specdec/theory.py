"""The gain to expect of speculative decoding: from acceptance and the two models' measured forward times.

Leviathan et al. 2023 (arXiv 2211.17192): with acceptance rate a, the same at every position and independent, a block
of G drafted tokens yields (1 - a^(G+1)) / (1 - a) tokens (equation 1), and with a draft forward that takes c times as
long as a teacher forward, decoding is (1 - a^(G+1)) / ((1 - a)(G c + 1)) times as fast (theorem 3.8).

Two of its assumptions are dropped where they can be measured. Acceptance depends on the position in the block, so the
yield is 1 + a_1 + a_1 a_2 + ... with each position's own rate given that all before it were accepted. And a teacher
forward over G + 1 positions takes longer than over one, on a CPU much longer, so its own time stands in the formula.
Both speed-ups are reported, this one and the paper's.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from statistics import median

import torch
from transformers import PreTrainedModel

from skd_lib.results import Forwards
from skd_lib.sampling.drafting import expected_tokens
from skd_lib.sampling.timing import Forward, bare


def stretched(by_position: Sequence[float], gamma: int) -> list[float]:
    """Return rates of `gamma` positions: those that were never tested are taken to be like the last that was."""
    known = list(by_position[:gamma]) or [1.0]
    return [*known, *known[-1:] * (gamma - len(known))]


def block_seconds(forwards: Forwards, gamma: int) -> float:
    """Return the seconds to draft `gamma` tokens and to score them and the position after them."""
    return forwards.draft_start_seconds + (gamma - 1) * forwards.draft_seconds + forwards.teacher_seconds[gamma + 1]


def speedup(forwards: Forwards, by_position: Sequence[float], gamma: int) -> float:
    """Return the theoretical speed-up with acceptance by position and the time of the teacher's whole block."""
    tokens = expected_tokens(stretched(by_position, gamma))
    return tokens * forwards.teacher_seconds[1] / block_seconds(forwards, gamma)


def break_even(forwards: Forwards, tokens: float, gamma: int) -> float:
    """Return the share of the draft's time at which decoding is as fast as without: E t(1) = share * D + t(gamma + 1).

    Args:
        forwards: The measured times: D is the draft's over a block, t(n) the teacher's over n positions.
        gamma: Tokens drafted for a block.
        tokens: E, those that a block yields.
    """
    verifying = forwards.teacher_seconds[gamma + 1]
    drafting = block_seconds(forwards, gamma) - verifying
    return (tokens * forwards.teacher_seconds[1] - verifying) / drafting


def speedup_of_paper(forwards: Forwards, rate: float, gamma: int) -> float:
    """Return the speed-up of Leviathan et al.'s theorem 3.8, with c = draft / teacher, each over one position."""
    return expected_tokens([rate] * gamma) / (gamma * forwards.draft_seconds / forwards.teacher_seconds[1] + 1)


def measure_forwards(
    teacher: PreTrainedModel,
    draft: PreTrainedModel,
    *,
    rows: int,
    positions: int,
    gammas: Iterable[int],
    repeats: int = 3,
) -> Forwards:
    """Time the forwards that decoding is made of, in turns.

    Args:
        teacher: On the draft's device.
        draft: The draft model.
        rows: Of the batch.
        positions: Cached positions a row, these forwards' own included.
        gammas: Draft lengths: the teacher is timed over one position and over each plus one.
        repeats: Timed forwards of each kind, after one untimed.
    """
    widths = sorted({1, *(gamma + 1 for gamma in gammas)})
    shapes = [(draft, 1, 1), (draft, 2, 1), *((teacher, width, width) for width in widths)]
    passes = [
        bare([Forward(model, rows, width, max(positions, width), at_head=rows * at_head)])
        for model, width, at_head in shapes
    ]
    seconds: list[list[float]] = [[] for _ in passes]
    for repeat in range(repeats + 1):
        for run, taken in zip(passes, seconds, strict=True):
            started = time.perf_counter()
            run()
            if teacher.device.type == "cuda":
                torch.cuda.synchronize(teacher.device)
            if repeat:
                taken.append(time.perf_counter() - started)
    one, two, *blocks = (median(taken) for taken in seconds)
    by_width = dict(zip(widths, blocks, strict=True))
    return Forwards(draft_seconds=one, draft_start_seconds=two, teacher_seconds=by_width)
