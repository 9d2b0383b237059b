"""The course of a training, made of its logged history: the curves of the report and of a comparison."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from statistics import NormalDist
from typing import Any

from skd_lib.report.series import thinned

TRAINING_PHASES = ("seconds_rollout", "seconds_loss", "seconds_optimiser")
"""The logged times that count as training: neither validation nor checkpoints."""
_SPENT = {
    "validation_tokens": ("response_tokens",),
    "validation_student_tokens": ("student_tokens",),
    "validation_teacher_tokens": ("teacher_tokens",),
    "validation_seconds": TRAINING_PHASES,
}
"""By field of `Course`: the figures of all steps before a validation that are added up."""
_Z = NormalDist().inv_cdf(0.975)
_History = Sequence[Mapping[str, float]]


def curves(history: _History, batch_size: int) -> dict[str, Any]:
    """Return the curves as fields of `Course`, of at most `POINTS` points each.

    `history` has the logged figures in order, with those from before a resume: a resumed run has the same curves.
    """
    found: dict[str, Any] = {}
    for steps, figures in {
        "steps": {"rejection_rate": "rejection_rate", "tokens_per_teacher_call": "tokens_per_teacher_call"},
        "training_steps": {"loss": "training_loss", "response_tokens": "response_length"},
        "validation_steps": {"validation_loss": "validation_loss"},
    }.items():
        # The loss of a step that was skipped may be none: the curves of one axis leave out the same steps.
        sound = [entry for entry in history if all(math.isfinite(entry.get(figure, 0.0)) for figure in figures)]
        for figure, name in figures.items():
            entries = [entry for entry in sound if figure in entry]
            scale = batch_size if name == "response_length" else 1
            found[steps], found[name] = thinned(
                [int(entry["step"]) for entry in entries], [entry[figure] / scale for entry in entries]
            )
    return found | _validations(history)


def _validations(history: _History) -> dict[str, list[float]]:
    """Return what had been spent at each validation, and half of the 95 % interval of its loss."""
    places = [place for place, entry in enumerate(history) if "validation_loss" in entry]
    values = {
        name: [
            total
            for place, total in enumerate(
                itertools.accumulate(sum(entry.get(figure, 0.0) for figure in figures) for entry in history)
            )
            if "validation_loss" in history[place]
        ]
        for name, figures in _SPENT.items()
    }
    errors = [history[place].get("validation_loss_error") for place in places]
    known = [_Z * error for error in errors if error is not None]
    if len(known) == len(errors):
        values["validation_half"] = known
    return {name: thinned(places, each)[1] for name, each in values.items()}
