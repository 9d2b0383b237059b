"""KFP component `student_init`: make the student that distillation starts from."""

from kfp import dsl

from components.command import run_step
from components.images import TRAIN


@dsl.container_component
def student_init(
    student: str,
    fingerprint: str,
    teacher: dsl.Input[dsl.Model],
    data: dsl.Input[dsl.Dataset],
    config: str,
    task_config: str,
    seed: int,
    label: str,
    initial_student: dsl.Output[dsl.Model],
) -> dsl.ContainerSpec:
    """Make the student that distillation starts from.

    As it is, fine-tuned on its own examples, or cut from the fine-tuned teacher by dropping middle layers.

    Args:
        student: Hub id, local folder, gs:// URI or wheel:// reference; empty to cut it from the teacher.
        fingerprint: Fingerprint of the student, from preflight: part of the cache key, and what is fetched.
        teacher: The fine-tuned teacher.
        data: Prepared data, as `prepare_data` wrote it.
        config: Section `student_init` of the configuration.
        task_config: How an example becomes a prompt and an answer is judged (section `task`).
        seed: Seed of everything random in this step.
        label: Tells this run of the step in MLflow from others of the same pipeline run.

    Returns:
        initial_student: The student before distillation, with a record of its making.
    """
    return run_step(
        "student_init",
        TRAIN,
        {
            "student": student,
            "fingerprint": fingerprint,
            "teacher": teacher.path,
            "data": data.path,
            "config": config,
            "task_config": task_config,
            "seed": seed,
            "label": label,
            "student_out": initial_student.path,
        },
        {"initial_student": initial_student},
        {"teacher": teacher, "data": data},
    )
