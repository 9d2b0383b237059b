"""The plan of a training: its optimiser steps, and the division of a step's rows over devices and forward passes."""

from __future__ import annotations

import math
from dataclasses import dataclass

from skd_lib.config import TrainingConfig
from skd_lib.errors import SkdError


@dataclass(frozen=True)
class StepPlan:
    """Optimiser steps, the rows of a forward pass on a device, and the forward passes of a device in a step."""

    steps: int
    micro_batch_size: int
    accumulation: int


def plan_steps(training: TrainingConfig, examples: int, *, processes: int) -> StepPlan:
    """Plan a training on `examples` rows, with `processes` devices that share each step."""
    share, rest = divmod(training.batch_size, processes)
    if rest:
        raise SkdError(
            f"batch_size {training.batch_size} cannot be divided over {processes} devices",
            where="training.batch_size",
            hint=f"use a multiple of {processes}",
        )
    micro_batch_size = min(training.micro_batch_size or share, share)
    if share % micro_batch_size:
        raise SkdError(
            f"micro_batch_size {micro_batch_size} does not divide the {share} sequences a device has in a step",
            where="training.micro_batch_size",
            hint="use a divisor, so that every step has the same number of sequences",
        )
    steps = training.max_steps or math.ceil(training.epochs * examples / training.batch_size)
    return StepPlan(steps, micro_batch_size, share // micro_batch_size)
