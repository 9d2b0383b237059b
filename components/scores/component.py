"""KFP component `scores`: show the scores of a model before and after training side by side."""

from kfp import dsl

from components.command import run_step
from components.images import TRAIN


@dsl.container_component
def scores(
    before: dsl.Input[dsl.Artifact],
    after: dsl.Input[dsl.Artifact],
    evaluations: dsl.Output[dsl.Artifact],
) -> dsl.ContainerSpec:
    """Show the scores of a model before and after training side by side.

    The log has the table; both evaluations go on as one folder.

    Args:
        before: Evaluation of the model before training, as `evaluate` wrote it.
        after: Evaluation of the model after training.

    Returns:
        evaluations: Folder with both, each under the name of its role.
    """
    return run_step(
        "scores",
        TRAIN,
        {
            "before": before.path,
            "after": after.path,
            "evaluations_out": evaluations.path,
        },
        {"evaluations": evaluations},
    )
