"""KFP component `teacher_sft`: fine-tune the teacher on the task."""

from kfp import dsl

from components.command import run_step
from components.images import TRAIN


@dsl.container_component
def teacher_sft(
    teacher: dsl.Input[dsl.Model],
    data: dsl.Input[dsl.Dataset],
    config: str,
    task_config: str,
    seed: int,
    tuned_teacher: dsl.Output[dsl.Model],
) -> dsl.ContainerSpec:
    """Fine-tune the teacher on the task.

    Resumes from its last checkpoint after a retry or a re-run. Passes the teacher on unchanged where the section says
    so.

    Args:
        teacher: The teacher.
        data: Prepared data, as `prepare_data` wrote it.
        config: Section `teacher_sft` of the configuration.
        task_config: How an example becomes a prompt and an answer is judged (section `task`).
        seed: Seed of everything random in this step.

    Returns:
        tuned_teacher: The fine-tuned teacher, with a record of its training.
    """
    return run_step(
        "teacher_sft",
        TRAIN,
        {
            "teacher": teacher.path,
            "data": data.path,
            "config": config,
            "task_config": task_config,
            "seed": seed,
            "teacher_out": tuned_teacher.path,
        },
        {"tuned_teacher": tuned_teacher},
        {"teacher": teacher, "data": data},
    )
