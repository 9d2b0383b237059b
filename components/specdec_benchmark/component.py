"""KFP component `specdec_benchmark`: measure the student as draft model for the teacher."""

from typing import Any

from kfp import dsl

from components.command import run_step
from components.images import TRAIN


@dsl.container_component
def specdec_benchmark(
    teacher: dsl.Input[dsl.Model],
    draft: dsl.Input[dsl.Model],
    data: dsl.Input[dsl.Dataset],
    role: str,
    config: dict[str, Any],
    task_config: dict[str, Any],
    seed: int,
    metrics: dsl.Output[dsl.Metrics],
    result: dsl.OutputPath(dict),
    tracking_uri: str = "",
    experiment: str = "skd",
) -> dsl.ContainerSpec:
    """Measure the student as draft model for the teacher.

    Acceptance rate, tokens per teacher call and wall-clock speed-up over decoding with the teacher alone, in the same
    run.

    Args:
        teacher: The fine-tuned teacher.
        draft: The student that drafts.
        data: Prepared data, as `prepare_data` wrote it.
        role: Which student it is: before or after distillation.
        config: Section `specdec` of the configuration.
        task_config: How an example becomes a prompt and an answer is judged (section `task`).
        seed: Seed of everything random in this step.
        tracking_uri: MLflow tracking server; empty turns tracking off.
        experiment: MLflow experiment.

    Returns:
        metrics: Acceptance, tokens per teacher call and speed-up.
        result: The same figures.
    """
    return run_step(
        "specdec_benchmark",
        TRAIN,
        {
            "teacher": teacher.path,
            "draft": draft.path,
            "data": data.path,
            "role": role,
            "config": config,
            "task_config": task_config,
            "seed": seed,
            "tracking_uri": tracking_uri,
            "experiment": experiment,
            "metrics_out": metrics.path,
        },
    )
