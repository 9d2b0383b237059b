"""KFP component `gate`: decide whether the student becomes the champion."""

from typing import Any

from kfp import dsl

from components.command import run_step
from components.images import TRAIN


@dsl.container_component
def gate(
    registry_config: dict[str, Any],
    task_config: dict[str, Any],
    student_after: dict[str, Any],
    champion: dict[str, Any],
    comet: dict[str, Any],
    promote: dsl.OutputPath(str),
    reason: dsl.OutputPath(str),
    tracking_uri: str = "",
    experiment: str = "skd",
) -> dsl.ContainerSpec:
    """Decide whether the student becomes the champion.

    It does when no champion exists, or when it beats the champion's task metric by the margin the section asks for and
    is not slower as a draft than the section allows, both measured by this run.

    Args:
        registry_config: Section `registry` of the configuration.
        task_config: How an example becomes a prompt and an answer is judged (section `task`).
        student_after: Scores of the student after distillation.
        champion: The registered champion as `evaluate_champion` has measured it.
        comet: COMET's scores of all models, or why they are missing.
        tracking_uri: MLflow tracking server; empty turns tracking off.
        experiment: MLflow experiment.

    Returns:
        promote: `true` or `false`.
        reason: Why, in one sentence.
    """
    return run_step(
        "gate",
        TRAIN,
        {
            "registry_config": registry_config,
            "task_config": task_config,
            "student_after": student_after,
            "champion": champion,
            "comet": comet,
            "tracking_uri": tracking_uri,
            "experiment": experiment,
        },
    )
