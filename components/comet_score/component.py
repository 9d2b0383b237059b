"""KFP component `comet_score`: score all models' answers with COMET."""

from typing import Any

from kfp import dsl

from components.command import run_step
from components.images import COMET


@dsl.container_component
def comet_score(
    teacher_base: dsl.Input[dsl.Artifact],
    teacher: dsl.Input[dsl.Artifact],
    student_before: dsl.Input[dsl.Artifact],
    student_after: dsl.Input[dsl.Artifact],
    champion: dsl.Input[dsl.Artifact],
    config: dict[str, Any],
    task_config: dict[str, Any],
    seed: int,
    segments: dsl.Output[dsl.Artifact],
    metrics: dsl.Output[dsl.Metrics],
    scores: dsl.OutputPath(dict),
) -> dsl.ContainerSpec:
    """Score all models' answers with COMET.

    Each answer, each model's mean with its 95 % bootstrap interval, and paired tests. Where COMET or its model is not
    to be had the step succeeds all the same, and says why.

    Args:
        teacher_base: Answers of the teacher before fine-tuning, as `evaluate` wrote them.
        teacher: Answers of the fine-tuned teacher.
        student_before: Answers of the student before distillation.
        student_after: Answers of the student after distillation.
        champion: Answers of the registered champion; empty where there are none.
        config: Section `evaluation` of the configuration.
        task_config: How an answer is judged (section `task`); without the metric `comet` nothing is done.
        seed: Seed of the bootstrap.

    Returns:
        segments: One JSON line per answer, with its score.
        metrics: Scores, intervals and paired tests.
        scores: Scores and intervals by model, paired tests, and what is missing.
    """
    return run_step(
        "comet_score",
        COMET,
        {
            "teacher_base": teacher_base.path,
            "teacher": teacher.path,
            "student_before": student_before.path,
            "student_after": student_after.path,
            "champion": champion.path,
            "config": config,
            "task_config": task_config,
            "seed": seed,
            "segments_out": segments.path,
            "metrics_out": metrics.path,
        },
    )
