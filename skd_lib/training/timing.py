"""Where the time and the memory of a training step go."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

SECONDS, PEAK_BYTES = "seconds_", "peak_bytes_"
"""Prefixes of the figures that a timer gives."""


class PhaseTimer:
    """Adds up the wall-clock seconds of named phases, and on a GPU notes the most memory that each took.

        with timer("rollout"):
            ...
        timer.take()  # {"seconds_rollout": 1.2}

    Args:
        device: On a GPU a phase ends when the device has finished its work, not when it was queued.
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
        """Since the last call: `seconds_PHASE` and, on a GPU, `peak_bytes_PHASE`."""
        taken: dict[str, float] = {SECONDS + phase: seconds for phase, seconds in self._seconds.items()}
        taken |= {PEAK_BYTES + phase: peak for phase, peak in self._peaks.items()}
        self._seconds.clear()
        self._peaks.clear()
        return taken
