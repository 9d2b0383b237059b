"""KFP component `distill`: train the student under the teacher."""

from kfp import dsl

from skd_kfp.components.command import run_step
from skd_kfp.components.images import TRAIN


@dsl.container_component
def distill(
    student: dsl.Input[dsl.Model],
    teacher: dsl.Input[dsl.Model],
    data: dsl.Input[dsl.Dataset],
    config: str,
    distilled_student: dsl.Output[dsl.Model],
) -> dsl.ContainerSpec:
    """Train the student under the teacher.

    Speculative Knowledge Distillation and the methods it is compared with. Resumes from its last checkpoint after a
    retry or a re-run.

    Args:
        student: The student before distillation.
        teacher: The fine-tuned teacher.
        data: Prepared data, as `prepare_data` wrote it.
        config: The run's settings that this step depends on, as JSON: `distill`, `task`, `seed`, `label`.

    Returns:
        distilled_student: The student after distillation, with a record of its training: curves, samples, lineage.
    """
    return run_step(
        "distill",
        TRAIN,
        {
            "student": student.path,
            "teacher": teacher.path,
            "data": data.path,
            "config": config,
            "student_out": distilled_student.path,
        },
        {"distilled_student": distilled_student},
    )
