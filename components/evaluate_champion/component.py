"""KFP component `evaluate_champion`: measure the registered champion as the new student has been."""

from kfp import dsl

from components.command import run_step
from components.images import TRAIN


@dsl.container_component
def evaluate_champion(
    student: dsl.Input[dsl.Model],
    teacher: dsl.Input[dsl.Model],
    data: dsl.Input[dsl.Dataset],
    registry_config: str,
    evaluation_config: str,
    specdec_config: str,
    task_config: str,
    seed: int,
    champion: dsl.Output[dsl.Artifact],
) -> dsl.ContainerSpec:
    """Measure the registered champion as the new student has been.

    On the same test set, and as a draft of the same teacher, in turns with the new student. Done at once where there is
    no champion, or where it has the new student's weights.

    Args:
        student: The new student.
        teacher: The fine-tuned teacher that both draft for.
        data: Prepared data, as `prepare_data` wrote it.
        registry_config: Section `registry` of the configuration.
        evaluation_config: Section `evaluation` of the configuration.
        specdec_config: Section `specdec` of the configuration, whose headline setting is measured.
        task_config: How an example becomes a prompt and an answer is judged (section `task`).
        seed: Seed of everything random in this step.

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
            "registry_config": registry_config,
            "evaluation_config": evaluation_config,
            "specdec_config": specdec_config,
            "task_config": task_config,
            "seed": seed,
            "champion_out": champion.path,
        },
        {"champion": champion},
        {"student": student, "teacher": teacher, "data": data},
    )
