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
    checkpoint_root: str,
    distilled_student: dsl.Output[dsl.Model],
    metrics: dsl.Output[dsl.Metrics],
    samples: dsl.Output[dsl.Artifact],
    course: dsl.OutputPath(dict),
    tracking_uri: str = "",
    experiment: str = "skd",
    label: str = "",
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
        checkpoint_root: Where checkpoints outlive the pod: a gs:// URI, or a folder on a volume. A retry resumes there.
        tracking_uri: MLflow tracking server; empty turns tracking off.
        experiment: MLflow experiment.
        label: Tells this run of the step in MLflow from others of the same pipeline run.

    Returns:
        distilled_student: The student after distillation.
        metrics: Losses, rejection rate and timings.
        samples: A few training sequences token by token, with what the teacher replaced: JSONL.
        course: Losses, rejection rate and lengths by step, and where the time went.
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
            "checkpoint_root": checkpoint_root,
            "tracking_uri": tracking_uri,
            "experiment": experiment,
            "label": label,
            "student_out": distilled_student.path,
            "metrics_out": metrics.path,
            "samples_out": samples.path,
        },
    )
