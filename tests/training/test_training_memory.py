"""What the loss takes of memory, measured at the allocator, against one that holds all logits."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import PreTrainedModel

from skd_lib.distillation.divergences import forward_kl
from skd_lib.distillation.loss import DistillationLoss
from skd_lib.distillation.teacher_signal import DenseSignal

POSITIONS, VOCABULARY, HIDDEN = 4 * 2048, 151_936, 896
"""Four rows of 2048 tokens under a Qwen2 0.5B student. The machine need not hold this: sizes are divided by SCALE."""
SCALE = 8
CHUNK_ELEMENTS = 2**26


def peak_bytes(work: Callable[[], object]) -> int:
    """The most bytes that were allocated at a time inside, over what was before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        work()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def test_the_loss_takes_an_eighth_of_the_dense_ones_memory(tiny_model: Callable[..., PreTrainedModel]) -> None:
    # Positions and width by the same divisor, so that the head's gradient keeps its share of the logits.
    positions, hidden, vocabulary = POSITIONS // SCALE, HIDDEN // SCALE, VOCABULARY // 32
    chunk = CHUNK_ELEMENTS // VOCABULARY // SCALE  # the same share of the positions as at full size
    student, teacher = (
        tiny_model(seed=seed, hidden=hidden, layers=1, vocab_size=vocabulary, tie_word_embeddings=False)
        for seed in (1, 2)
    )

    def measured(chunk: int) -> tuple[int, Tensor]:
        states = torch.randn(positions, hidden, generator=torch.Generator().manual_seed(0)).requires_grad_()
        student.zero_grad()

        def work() -> None:
            signal = DenseSignal(states.detach(), teacher)
            tokens = torch.zeros(positions, dtype=torch.long)
            sums = DistillationLoss(forward_kl)(student, states, signal, tokens, tokens.bool(), chunk=chunk)
            (sums.loss / positions).backward()

        peak = peak_bytes(work)
        assert states.grad is not None
        return peak, states.grad

    dense, expected = measured(chunk=positions)
    chunked, gradient = measured(chunk)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-8)
    # All logits and log-probabilities of both models at once, at the least.
    assert dense > 4 * 4 * positions * vocabulary
    print(f"dense {dense / 2**20:.1f} MiB, chunked {chunked / 2**20:.1f} MiB, {dense / chunked:.1f} times less")
    assert chunked < dense / 8
