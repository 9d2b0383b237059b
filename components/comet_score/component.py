"""KFP component `comet_score`: score all models' answers with COMET."""

from kfp import dsl

from components.command import run_step
from components.images import COMET


@dsl.container_component
def comet_score(
    teacher_evaluations: dsl.Input[dsl.Artifact],
    student_evaluations: dsl.Input[dsl.Artifact],
    champion: dsl.Input[dsl.Artifact],
    config: str,
    task_config: str,
    seed: int,
    segments: dsl.Output[dsl.Artifact],
    scores: dsl.OutputPath(str),
) -> dsl.ContainerSpec:
    """Score all models' answers with COMET.

    Each answer, each model's mean with its 95 % bootstrap interval, and paired tests. Where COMET or its model is not
    to be had the step succeeds all the same, and says why.

    Args:
        teacher_evaluations: Evaluations of the teacher, before and after fine-tuning, as `scores` put them together.
        student_evaluations: Evaluations of the student, before and after distillation, likewise.
        champion: The registered champion, as `evaluate_champion` wrote it.
        config: Section `evaluation` of the configuration.
        task_config: How an answer is judged (section `task`); without the metric `comet` nothing is done.
        seed: Seed of the bootstrap.

    Returns:
        segments: One JSON line per answer, with its score.
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
            "task_config": task_config,
            "seed": seed,
            "segments_out": segments.path,
        },
        {"segments": segments, "scores": scores},
    )
