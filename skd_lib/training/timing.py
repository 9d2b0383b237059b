"""Where the time of a training step goes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class PhaseTimer:
    """Adds up the wall-clock seconds of named phases.

        with timer("rollout"):
            ...
        timer.take()  # {"seconds_rollout": 1.2}

    Args:
        device: On an accelerator a phase ends when the device has finished its work, not when it was queued.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Time the body as part of `phase`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            self._seconds[phase] = self._seconds.get(phase, 0.0) + time.perf_counter() - start

    def take(self) -> dict[str, float]:
        """Seconds of each phase since the last call, as `seconds_PHASE`."""
        taken = {f"seconds_{phase}": seconds for phase, seconds in self._seconds.items()}
        self._seconds.clear()
        return taken
