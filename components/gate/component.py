"""KFP component `gate`: decide whether the student becomes the champion."""

from kfp import dsl

from components.command import run_step
from components.images import TRAIN


@dsl.container_component
def gate(
    measured: str,
    promote: dsl.OutputPath(str),
    reason: dsl.OutputPath(str),
) -> dsl.ContainerSpec:
    """Decide whether the student becomes the champion.

    It does when no champion exists, or when it beats the champion's task metric by the margin the section asks for and
    is not slower as a draft than the section allows, both measured by this run.

    Args:
        measured: The student and the champion as measured, and section `registry`, from `report`.

    Returns:
        promote: `true` or `false`.
        reason: Why, in one sentence.
    """
    return run_step(
        "gate",
        TRAIN,
        {
            "measured": measured,
        },
        {"promote": promote, "reason": reason},
    )
