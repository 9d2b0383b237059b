"""KFP component `student_init`: make the student that distillation starts from."""

from kfp import dsl

from skd_kfp.components.command import run_step
from skd_kfp.components.images import TRAIN


@dsl.container_component
def student_init(
    teacher: dsl.Input[dsl.Model],
    data: dsl.Input[dsl.Dataset],
    config: str,
    initial_student: dsl.Output[dsl.Model],
) -> dsl.ContainerSpec:
    """Make the student that distillation starts from.

    As it is, fine-tuned on its own examples, or cut from the fine-tuned teacher by dropping middle layers.

    Args:
        teacher: The fine-tuned teacher.
        data: Prepared data, as `prepare_data` wrote it.
        config: The run's settings that this step depends on, as JSON: `student`, `fingerprint`, `student_init`, `task`,
            `seed`, `label`.

    Returns:
        initial_student: The student before distillation, with a record of its making.
    """
    return run_step(
        "student_init",
        TRAIN,
        {
            "teacher": teacher.path,
            "data": data.path,
            "config": config,
            "student_out": initial_student.path,
        },
        {"initial_student": initial_student},
    )
