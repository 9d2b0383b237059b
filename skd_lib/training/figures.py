"""Figures of a training step: its seconds, memory and cost in tokens, and the warnings that their history gives.

The judgements are functions of the logged history, which is part of a checkpoint: a resumed run judges as an
uninterrupted one does.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from statistics import fmean, median
from typing import NamedTuple

import torch
from torch import Tensor

from skd_lib.distillation.batch import Rollout
from skd_lib.sampling.samples import SamplingStatistics

SECONDS, PEAK_BYTES = "seconds_", "peak_bytes_"
"""Prefixes of the figures that a timer gives."""
_LOSSES = 50
_LOSSES_NEEDED = 10
"""Number of the latest losses whose median is taken, and the fewest that are judged by it."""
_RESPONSES = 10
"""Number of first and last steps whose responses are compared."""

History = Sequence[Mapping[str, float]]


class PhaseTimer:
    """Adds up the wall-clock seconds of named phases, and on a GPU notes the most memory that each took.

        with timer("rollout"):
            ...
        timer.take()  # {"seconds_rollout": 1.2}

    On a GPU a phase ends when the device has finished its work.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seconds: dict[str, float] = {}
        self._peaks: dict[str, int] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Time the body as part of `phase`."""
        on_gpu = self._device.type == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(self._device)
        start = time.perf_counter()
        try:
            yield
        finally:
            if on_gpu:
                torch.cuda.synchronize(self._device)
                self._peaks[phase] = max(self._peaks.get(phase, 0), torch.cuda.max_memory_allocated(self._device))
            self._seconds[phase] = self._seconds.get(phase, 0.0) + time.perf_counter() - start

    def take(self) -> dict[str, float]:
        """Return `seconds_PHASE` and, on a GPU, `peak_bytes_PHASE` since the last call."""
        taken: dict[str, float] = {SECONDS + phase: seconds for phase, seconds in self._seconds.items()}
        taken |= {PEAK_BYTES + phase: peak for phase, peak in self._peaks.items()}
        self._seconds.clear()
        self._peaks.clear()
        return taken


class TokensProcessed(NamedTuple):
    """Token positions that went through each model's decoder; padding and the backward pass are not counted.

    Attributes:
        student: While sampling, as the sampler counted them; and whole sequences for the loss.
        teacher: While sampling, as the sampler counted them; and whole sequences for the loss where its signal is not
            known from sampling, which vLLM's servers count with the sampler's. Signals stored before training are not
            counted.
    """

    student: int
    teacher: int


def tokens_processed(rollout: Rollout, *, divergence: bool) -> TokensProcessed:
    """Return the cost of one optimiser step's rollout and of its loss, which may be a divergence from the teacher."""
    sequences = rollout.sequence_lengths
    sampled = rollout.statistics or SamplingStatistics()
    asked = [whole for whole, signal in zip(sequences, rollout.signals, strict=True) if divergence and signal is None]
    return TokensProcessed(sampled.student_positions + sum(sequences), sampled.teacher_positions + sum(asked))


def sampling_figures(statistics: SamplingStatistics) -> dict[str, float]:
    """Return the figures of a sampled batch: none of ground truth, and no rates of tests that were not made."""
    if not statistics.sequences:
        return {}
    figures = {
        "truncated_fraction": statistics.truncated_fraction,
        "response_length_mean": statistics.tokens / statistics.sequences,
    }
    rates = ("rejection_rate", "acceptance_rate", "tokens_per_teacher_call", "replacements_per_sequence")
    return figures | ({name: getattr(statistics, name) for name in rates} if statistics.tested else {})


def ratio_sums(losses: Tensor, tokens: Tensor) -> Tensor:
    """Return the sums over rows that `ratio_error` needs, which may be added up over batches and processes.

    `losses` are each row's sum of the loss over its response tokens, `tokens` their number.
    """
    losses, tokens = losses.double().cpu(), tokens.double().cpu()
    return torch.stack([torch.ones_like(losses), losses, tokens, losses**2, losses * tokens, tokens**2]).sum(1)


def ratio_error(sums: Sequence[float]) -> float | None:
    """Return the standard error of a mean loss over tokens, where whole rows are the sample; None of one row.

    The mean is a ratio, of summed loss and summed tokens, both of which vary from row to row (Cochran 1977, 2.11).
    """
    rows, losses, tokens, losses_squared, products, tokens_squared = sums
    if rows < 2 or not tokens:
        return None
    mean = losses / tokens
    residuals = losses_squared - 2 * mean * products + mean**2 * tokens_squared
    return math.sqrt(max(residuals, 0.0) * rows / (rows - 1)) / tokens


def skipped_steps(history: History) -> tuple[int, int]:
    """Count the skipped optimiser steps: in all, and in a row up to the last."""
    counts = [entry["skipped_steps"] for entry in history if "skipped_steps" in entry]
    total = int(counts[-1]) if counts else 0
    # The count grows by one at each skipped step: the row is as long as the count has been growing.
    row = 0
    for before, after in zip([0, *counts][-2::-1], counts[::-1], strict=True):
        if after == before:
            break
        row += 1
    return total, row


def broken_step(loss: float, grad_norm: float, history: History, explosion_factor: float) -> str:
    """Return the reason why an optimiser step must be skipped; empty if there is none.

    The norm is that before clipping; a loss above `explosion_factor` times the median of the latest ones is broken.
    """
    if not math.isfinite(loss):
        return f"the loss is {loss}"
    if not math.isfinite(grad_norm):
        return f"the norm of the gradient is {grad_norm}"
    losses = [entry["loss"] for entry in history if "loss" in entry and math.isfinite(entry["loss"])][-_LOSSES:]
    if len(losses) >= _LOSSES_NEEDED and loss > explosion_factor * (usual := median(losses)) > 0:
        return f"the loss is {loss:.4g}, {loss / usual:.0f} times the median of the last {len(losses)} steps"
    return ""


def response_trouble(history: History) -> str:
    """Describe responses that stopped ending, or that end at once, since the start; empty if they do neither."""
    sampled = [entry for entry in history if "response_length_mean" in entry]
    if len(sampled) < 2 * _RESPONSES:
        return ""
    first, last = sampled[:_RESPONSES], sampled[-_RESPONSES:]

    def means(figure: str) -> tuple[float, float]:
        return fmean(entry[figure] for entry in first), fmean(entry[figure] for entry in last)

    cut_before, cut_now = means("truncated_fraction")
    if cut_now > 0.9 and cut_before < 0.5:
        return (
            f"responses no longer end: {cut_now:.0%} of the last {_RESPONSES} steps' were cut at max_new_tokens, "
            f"{cut_before:.0%} at the start. Lower the learning rate, or use a smaller top_k or more ground truth, "
            "which hold the student to what ends"
        )
    length_before, length_now = means("response_length_mean")
    if length_now < 1.5 and length_before > 3:
        return (
            f"responses have collapsed to {length_now:.1f} tokens on average, from {length_before:.1f} at the start: "
            "the student ends at once. Lower the learning rate, or use a smaller top_k or more ground truth"
        )
    return ""
