"""The gate: whether a new student (the challenger) takes the champion's place.

Both are measured by the run that asks (step `evaluate_champion`): their scores on the same test set, their worth as
drafts of the same teacher, in turns. The figures that the champion was registered with may be of other data and another
teacher, and decide nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from pydantic import Field

from skd_lib.config import Section
from skd_lib.errors import SkdError


class Rival(Section):
    """The registered champion as this run has measured it; all empty where there is none."""

    version: str = Field("", description="Its version in the registry; empty: there is no champion.")
    is_this_student: bool = Field(False, description="It has the new student's very weights.")
    figures: dict[str, float] = Field({}, description="Its scores on this run's test set, by metric.")
    speedup: float | None = Field(None, description="Its speed-up as a draft of this run's teacher.")
    challenger_speedup: float | None = Field(None, description="The new student's, measured in turns with it.")
    missing: str = Field("", description="Why it could not be measured.")
    undrafted: str = Field("", description="Why it could not draft for this run's teacher.")


@dataclass(frozen=True)
class Decision:
    """What the gate decided, and why in one sentence."""

    promote: bool
    reason: str


def decide(
    challenger: Mapping[str, float],
    champion: Rival,
    metric: str,
    *,
    higher_is_better: bool = True,
    min_improvement: float = 0.0,
    max_slowdown: float = 0.0,
) -> Decision:
    """Compare both on the task's metric and as drafts.

    The first version is promoted, a later one if its score beats the champion's by more than `min_improvement` and its
    speed-up as a draft is at least 1 - `max_slowdown` times the champion's. A champion that cannot be measured cannot
    be beaten: somebody has to move the alias by hand. One that cannot draft for this teacher is compared by score
    alone.

    Args:
        challenger: The new student's scores, by metric.
        champion: The registered champion, as measured by this run.
        metric: The one that decides.
        higher_is_better: Whether more of it is better.
        min_improvement: In the metric's unit, 0 or more.
        max_slowdown: 0 to 1, a share of the champion's speed-up.

    Raises:
        SkdError: the challenger has no such score, or it is not a number.
    """
    score = challenger.get(metric, math.nan)
    if math.isnan(score):
        raise SkdError(
            f"the student has no score `{metric}` to decide by",
            where="gate",
            hint=f"evaluation must yield the first of `task.metrics`; it yielded {sorted(challenger)}",
        )
    shown, name = f"{metric} {score:.2f}", f"the champion (version {champion.version})"
    if not champion.version:
        return Decision(True, f"first champion of this name, with {shown}")
    if champion.is_this_student:
        return Decision(True, f"{name} is this very student, with {shown}")
    rival = champion.figures.get(metric, math.nan)
    if math.isnan(rival):
        why = champion.missing or f"it has no {metric} on this data"
        hint = "set the alias champion by hand to replace it"
        return Decision(False, f"{name} could not be measured; {hint}: {why}")
    gain = score - rival if higher_is_better else rival - score
    better = gain > min_improvement
    needed = f"more than {min_improvement:g} better" if min_improvement else "better"
    reason = f"{shown} against {rival:.2f} of {name}: {'' if better else 'not '}{needed}"
    fast_enough = True
    if champion.speedup is not None and champion.challenger_speedup is not None:
        fast_enough = champion.challenger_speedup >= (1 - max_slowdown) * champion.speedup
        verdict = f"{'not ' if fast_enough else ''}more than {100 * max_slowdown:g} % slower"
        reason += f"; as draft {champion.challenger_speedup:.2f}x against {champion.speedup:.2f}x: {verdict}"
    elif champion.undrafted:
        reason += f"; not compared as drafts: {champion.undrafted}"
    return Decision(better and fast_enough, reason)
