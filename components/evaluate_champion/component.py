"""KFP component `evaluate_champion`: measure the registered champion as the new student has been."""

from kfp import dsl

from skd_kfp.components.command import run_step
from skd_kfp.components.images import TRAIN


@dsl.container_component
def evaluate_champion(
    student: dsl.Input[dsl.Model],
    teacher: dsl.Input[dsl.Model],
    data: dsl.Input[dsl.Dataset],
    config: str,
    champion: dsl.Output[dsl.Artifact],
) -> dsl.ContainerSpec:
    """Measure the registered champion as the new student has been.

    On the same test set, and as a draft of the same teacher, in turns with the new student. Done at once where there is
    no champion, or where it has the new student's weights.

    Args:
        student: The new student.
        teacher: The fine-tuned teacher that both draft for.
        data: Prepared data, as `prepare_data` wrote it.
        config: The run's settings that this step depends on, as JSON: `evaluation`, `specdec` (its headline setting is
            measured), `registry`, `task`, `seed`.

    Returns:
        champion: Folder with `champion.json` (version, scores, speed-ups) and, where it was measured, its answers.
    """
    return run_step(
        "evaluate_champion",
        TRAIN,
        {
            "student": student.path,
            "teacher": teacher.path,
            "data": data.path,
            "config": config,
            "champion_out": champion.path,
        },
        {"champion": champion},
    )
