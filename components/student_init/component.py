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
    checkpoint_root: str,
    initial_student: dsl.Output[dsl.Model],
    metrics: dsl.Output[dsl.Metrics],
    tracking_uri: str = "",
    experiment: str = "skd",
    label: str = "",
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
        checkpoint_root: Where checkpoints outlive the pod: a gs:// URI, or a folder on a volume. A retry resumes there.
        tracking_uri: MLflow tracking server; empty turns tracking off.
        experiment: MLflow experiment.
        label: Tells this run of the step in MLflow from others of the same pipeline run.

    Returns:
        initial_student: The student before distillation.
        metrics: Losses and timings.
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
            "checkpoint_root": checkpoint_root,
            "tracking_uri": tracking_uri,
            "experiment": experiment,
            "label": label,
            "student_out": initial_student.path,
            "metrics_out": metrics.path,
        },
    )
