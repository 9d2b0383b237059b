"""KFP component `show`: show what an artifact holds."""

from kfp import dsl

from skd_kfp.components.command import run_step
from skd_kfp.components.images import TRAIN


@dsl.container_component
def show(artifact: dsl.Input[dsl.Artifact]) -> dsl.ContainerSpec:
    """Show what an artifact holds.

    The log has it: how many examples the prepared data has, or the scores of evaluated models.

    Args:
        artifact: What `prepare_data`, `evaluate` or `evaluate_student` wrote.
    """
    return run_step("show", TRAIN, {"artifact": artifact.path}, {})
