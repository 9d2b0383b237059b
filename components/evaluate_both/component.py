"""KFP component `evaluate_both`: score a model's greedy answers before and after training."""

from kfp import dsl

from components.command import run_step
from components.images import TRAIN


@dsl.container_component
def evaluate_both(
    before: dsl.Input[dsl.Model],
    after: dsl.Input[dsl.Model],
    data: dsl.Input[dsl.Dataset],
    pair: str,
    config: str,
    evaluations: dsl.Output[dsl.Artifact],
) -> dsl.ContainerSpec:
    """Score a model's greedy answers before and after training.

    Does what `evaluate` does, for two models one after the other.

    Args:
        before: The model before training.
        after: The model after training.
        data: Prepared data, as `prepare_data` wrote it.
        pair: Which model it is: teacher or student.
        config: The run's settings that this step depends on, as JSON: `evaluation`, `task`, `seed`.

    Returns:
        evaluations: Folder with both evaluations, each under the name of its role.
    """
    return run_step(
        "evaluate_both",
        TRAIN,
        {
            "before": before.path,
            "after": after.path,
            "data": data.path,
            "pair": pair,
            "config": config,
            "evaluations_out": evaluations.path,
        },
        {"evaluations": evaluations},
    )
