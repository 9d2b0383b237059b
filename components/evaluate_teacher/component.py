"""KFP component `evaluate_teacher`: score the teacher's greedy answers before and after fine-tuning."""

from kfp import dsl

from skd_kfp.components.command import run_step
from skd_kfp.components.images import TRAIN


@dsl.container_component
def evaluate_teacher(
    teacher: dsl.Input[dsl.Model],
    data: dsl.Input[dsl.Dataset],
    config: str,
    evaluations: dsl.Output[dsl.Artifact],
) -> dsl.ContainerSpec:
    """Score the teacher's greedy answers before and after fine-tuning.

    Does what `evaluate` does, for two models one after the other. The teacher before fine-tuning is fetched once more.

    Args:
        teacher: The fine-tuned teacher.
        data: Prepared data, as `prepare_data` wrote it.
        config: The run's settings that this step depends on, as JSON: `teacher`, `fingerprint`, `trust_remote_code`,
            `evaluation`, `task`, `seed`.

    Returns:
        evaluations: Folder with both evaluations, each under the name of its role.
    """
    return run_step(
        "evaluate_teacher",
        TRAIN,
        {"teacher": teacher.path, "data": data.path, "config": config, "evaluations_out": evaluations.path},
        {"evaluations": evaluations},
    )
