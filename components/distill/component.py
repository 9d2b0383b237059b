"""KFP component `distill`: train the student under the teacher."""

from kfp import dsl

from components.command import run_step
from components.images import TRAIN


@dsl.container_component
def distill(
    student: dsl.Input[dsl.Model],
    teacher: dsl.Input[dsl.Model],
    data: dsl.Input[dsl.Dataset],
    config: str,
    task_config: str,
    seed: int,
    label: str,
    distilled_student: dsl.Output[dsl.Model],
) -> dsl.ContainerSpec:
    """Train the student under the teacher.

    Speculative Knowledge Distillation and the methods it is compared with. Resumes from its last checkpoint after a
    retry or a re-run.

    Args:
        student: The student before distillation.
        teacher: The fine-tuned teacher.
        data: Prepared data, as `prepare_data` wrote it.
        config: Section `distill` of the configuration.
        task_config: How an example becomes a prompt and an answer is judged (section `task`).
        seed: Seed of everything random in this step.
        label: Tells this run of the step in MLflow from others of the same pipeline run.

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
            "task_config": task_config,
            "seed": seed,
            "label": label,
            "student_out": distilled_student.path,
        },
        {"distilled_student": distilled_student},
        {"student": student, "teacher": teacher, "data": data},
    )
