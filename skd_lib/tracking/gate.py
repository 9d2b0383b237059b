"""The gate: whether a new student (the challenger) takes the champion's place."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from skd_lib.errors import SkdError


@dataclass(frozen=True)
class Candidate:
    """A student as the gate sees it.

    Attributes:
        figures: Its scores by metric (`chrf`), and its worth as a draft (`specdec.speedup`).
        version: Its version in the registry; empty if it is not registered yet.
        pipeline_run_id: The pipeline run that made it.
        data_fingerprint: The data it was measured on; empty if that is not known.
    """

    figures: Mapping[str, float] = field(default_factory=dict)
    version: str = ""
    pipeline_run_id: str = ""
    data_fingerprint: str = ""


@dataclass(frozen=True)
class Decision:
    """What the gate decided, and why in one sentence (without quotes: it becomes a pipeline parameter)."""

    promote: bool
    reason: str


def decide(
    challenger: Candidate,
    champion: Candidate | None,
    metric: str,
    *,
    higher_is_better: bool = True,
    min_improvement: float = 0.0,
) -> Decision:
    """Compare both on the task's metric.

    The first version is promoted, a later one if it beats the champion by more than `min_improvement`. A champion
    without that figure cannot be beaten: somebody has to move the alias by hand. A run that is resumed after its
    student became champion gets the same answer again.

    Args:
        challenger: The new student.
        champion: The registered champion; None if there is none.
        metric: Key of the figures that decides.
        higher_is_better: Whether more of it is better.
        min_improvement: In the metric's unit, 0 or more.

    Raises:
        SkdError: the challenger has no such figure, or it is not a number.
    """
    score = challenger.figures.get(metric, math.nan)
    if math.isnan(score):
        raise SkdError(
            f"the student has no score `{metric}` to decide by",
            where="gate",
            hint=f"evaluation must yield the first of `task.metrics`; it yielded {sorted(challenger.figures)}",
        )
    shown = f"{metric} {score:.2f}"
    if champion is None:
        return Decision(True, f"first champion of this name, with {shown}")
    name = f"the champion (version {champion.version})"
    if champion.pipeline_run_id and champion.pipeline_run_id == challenger.pipeline_run_id:
        return Decision(True, f"{name} is the student of this very run, with {shown}")
    rival = champion.figures.get(metric, math.nan)
    if math.isnan(rival):
        return Decision(False, f"{name} has no {metric} to compare with; set the alias champion by hand to replace it")
    gain = score - rival if higher_is_better else rival - score
    needed = f"more than {min_improvement:g} better" if min_improvement else "better"
    reason = f"{shown} against {rival:.2f} of {name}: {'' if gain > min_improvement else 'not '}{needed}"
    if challenger.data_fingerprint and champion.data_fingerprint not in ("", challenger.data_fingerprint):
        reason += "; the two were measured on different data"
    return Decision(gain > min_improvement, reason)
