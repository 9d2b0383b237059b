"""KFP component `evaluate_student`: score the student's greedy answers before and after distillation."""

from kfp import dsl

from skd_kfp.components.command import run_step
from skd_kfp.components.images import TRAIN


@dsl.container_component
def evaluate_student(
    before: dsl.Input[dsl.Model],
    after: dsl.Input[dsl.Model],
    data: dsl.Input[dsl.Dataset],
    config: str,
    evaluations: dsl.Output[dsl.Artifact],
) -> dsl.ContainerSpec:
    """Score the student's greedy answers before and after distillation.

    Does what `evaluate` does, for two models one after the other.

    Args:
        before: The student before distillation.
        after: The student after distillation.
        data: Prepared data, as `prepare_data` wrote it.
        config: The run's settings that this step depends on, as JSON: `evaluation`, `task`, `seed`.

    Returns:
        evaluations: Folder with both evaluations, each under the name of its role.
    """
    return run_step(
        "evaluate_student",
        TRAIN,
        {
            "before": before.path,
            "after": after.path,
            "data": data.path,
            "config": config,
            "evaluations_out": evaluations.path,
        },
        {"evaluations": evaluations},
    )
