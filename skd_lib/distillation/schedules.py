"""Settings that change in the course of training.

A value is a function of the optimiser step alone, so that a run that was interrupted goes on with the values it would
have had.
"""

from __future__ import annotations

import math
from typing import Any

from skd_lib.config import Schedule


def value_at(setting: float | Schedule[Any], step: int, steps: int) -> float:
    """The value of a number (itself) or of a schedule at an optimiser step.

    Args:
        setting: From the configuration.
        step: Optimiser step, from 0: the schedule's `start`.
        steps: Steps of the whole training; the last one, `steps - 1`, has the schedule's `end`.
    """
    if not isinstance(setting, Schedule):
        return setting
    done = min(step / max(steps - 1, 1), 1.0)
    share = done if setting.shape == "linear" else (1 - math.cos(math.pi * done)) / 2
    return float(setting.start + (setting.end - setting.start) * share)
