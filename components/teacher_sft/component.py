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
    checkpoint_root: str,
    tuned_teacher: dsl.Output[dsl.Model],
    metrics: dsl.Output[dsl.Metrics],
    tracking_uri: str = "",
    experiment: str = "skd",
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
        checkpoint_root: Where checkpoints outlive the pod: a gs:// URI, or a folder on a volume. A retry resumes there.
        tracking_uri: MLflow tracking server; empty turns tracking off.
        experiment: MLflow experiment.

    Returns:
        tuned_teacher: The fine-tuned teacher.
        metrics: Losses and timings.
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
            "checkpoint_root": checkpoint_root,
            "tracking_uri": tracking_uri,
            "experiment": experiment,
            "teacher_out": tuned_teacher.path,
            "metrics_out": metrics.path,
        },
    )
