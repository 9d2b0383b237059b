"""KFP component `compare_table`: all runs of a comparison in one table."""

from typing import Any

from kfp import dsl

from components.command import run_step
from components.images import TRAIN


@dsl.container_component
def compare_table(
    run_name: str,
    results: dsl.Input[list[dsl.Artifact]],
    failed: list[dict],  # type: ignore[type-arg]  # KFP knows lists by this form
    teacher: dict[str, Any],
    reference: str,
    config: dict[str, Any],
    task_config: dict[str, Any],
    seed: int,
    page: dsl.Output[dsl.Markdown],
    runs: dsl.Output[dsl.Artifact],
    comparison: dsl.Output[dsl.Artifact],
    tracking_uri: str = "",
    experiment: str = "skd",
) -> dsl.ContainerSpec:
    """Put all runs of a comparison into one table.

    Means over seeds with 95 % intervals, paired tests against the reference variant with Holm's correction, and what
    each variant cost in tokens, steps and seconds.

    Args:
        run_name: Name of the comparison.
        results: Figures and answers of each run, as `compare_result` wrote them.
        failed: Runs that have no model, each with a reason.
        teacher: Scores of the fine-tuned teacher.
        reference: The variant that the others are tested against.
        config: Section `evaluation` of the configuration.
        task_config: How an example becomes a prompt and an answer is judged (section `task`).
        seed: Seed of everything random in this step.
        tracking_uri: MLflow tracking server; empty turns tracking off.
        experiment: MLflow experiment.

    Returns:
        page: The tables, as Kubeflow's page shows them.
        runs: CSV with one row a run.
        comparison: All figures as JSON.
    """
    return run_step(
        "compare_table",
        TRAIN,
        {
            "run_name": run_name,
            "failed": failed,
            "teacher": teacher,
            "reference": reference,
            "config": config,
            "task_config": task_config,
            "seed": seed,
            "tracking_uri": tracking_uri,
            "experiment": experiment,
            "page_out": page.path,
            "runs_out": runs.path,
            "comparison_out": comparison.path,
        },
    )
