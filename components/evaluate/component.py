"""KFP component `evaluate`: score a model's greedy answers on the test set and the held-out sets."""

from kfp import dsl

from skd_kfp.components.command import run_step
from skd_kfp.components.images import TRAIN


@dsl.container_component
def evaluate(
    model: dsl.Input[dsl.Model],
    data: dsl.Input[dsl.Dataset],
    role: str,
    config: str,
    evaluation: dsl.Output[dsl.Artifact],
) -> dsl.ContainerSpec:
    """Score a model's greedy answers on the test set and the held-out sets.

    Reports every metric of the task with its 95 % bootstrap interval, and keeps each example's prediction. A held-out
    set or a metric that cannot be had is reported as missing, with the reason.

    Args:
        model: The model to score.
        data: Prepared data, as `prepare_data` wrote it.
        role: Which model it is: teacher_base, teacher, student_before or student_after.
        config: The run's settings that this step depends on, as JSON: `evaluation`, `task`, `seed`, `label`.

    Returns:
        evaluation: Folder with scores, answers, and the record of the model's training.
    """
    return run_step(
        "evaluate",
        TRAIN,
        {
            "model": model.path,
            "data": data.path,
            "role": role,
            "config": config,
            "evaluation_out": evaluation.path,
        },
        {"evaluation": evaluation},
    )
