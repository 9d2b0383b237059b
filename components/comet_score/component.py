"""KFP component `comet_score`: score all models' answers with COMET."""

from kfp import dsl

from skd_kfp.components.command import run_step
from skd_kfp.components.images import COMET


@dsl.container_component
def comet_score(
    teacher_evaluations: dsl.Input[dsl.Artifact],
    student_evaluations: dsl.Input[dsl.Artifact],
    champion: dsl.Input[dsl.Artifact],
    config: str,
    scores: dsl.OutputPath(str),
) -> dsl.ContainerSpec:
    """Score all models' answers with COMET.

    Each model's mean with its 95 % bootstrap interval, and paired tests; the score of each answer goes to MLflow. Where
    COMET or its model is not to be had the step succeeds all the same, and says why.

    Args:
        teacher_evaluations: The teacher before and after fine-tuning, as `evaluate_teacher` wrote it.
        student_evaluations: The student before and after distillation, likewise.
        champion: The registered champion, as `evaluate_champion` wrote it.
        config: The run's settings that this step depends on, as JSON: `evaluation`, `task` (without the metric `comet`
            nothing is done), `seed`.

    Returns:
        scores: Scores and intervals by model, paired tests, and what is missing.
    """
    return run_step(
        "comet_score",
        COMET,
        {
            "teacher_evaluations": teacher_evaluations.path,
            "student_evaluations": student_evaluations.path,
            "champion": champion.path,
            "config": config,
        },
        {"scores": scores},
    )
