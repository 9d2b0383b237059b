"""KFP component `compare_table`: put all trials of a comparison into one table."""

from kfp import dsl

from skd_kfp.components.command import run_step
from skd_kfp.components.images import TRAIN


@dsl.container_component
def compare_table(
    evaluations: dsl.Input[list[dsl.Artifact]],
    drafts: dsl.Input[list[dsl.Artifact]],
    teacher_evaluations: dsl.Input[dsl.Artifact],
    config: str,
    plan: str,
    report: dsl.Output[dsl.Markdown],
    figures: dsl.Output[dsl.Metrics],
    comparison: dsl.Output[dsl.Artifact],
) -> dsl.ContainerSpec:
    """Put all trials of a comparison into one table.

    Means over seeds with 95 % intervals, paired tests against the reference variant with Holm's correction, and what
    each variant cost in tokens, steps and seconds.

    Args:
        evaluations: Evaluation of each student, as `evaluate` wrote it, in any order.
        drafts: Each student as a draft, as `specdec_benchmark` wrote it, in any order.
        teacher_evaluations: The teacher before and after fine-tuning, as `evaluate_teacher` wrote it.
        config: The run's settings that this step depends on, as JSON: `name`, `evaluation`, `task`, `seed`.
        plan: The comparison: reference, trials, and those left out, each with a reason.

    Returns:
        report: The tables, as Kubeflow's page shows them.
        figures: The means of the first variants, by which runs are compared.
        comparison: Folder with `comparison.json` (all figures) and `runs.csv` (one row a trial).
    """
    return run_step(
        "compare_table",
        TRAIN,
        {
            "teacher_evaluations": teacher_evaluations.path,
            "config": config,
            "plan": plan,
            "report_out": report.path,
            "figures_out": figures.path,
            "comparison_out": comparison.path,
        },
        {"report": report, "figures": figures, "comparison": comparison},
        lists=True,
    )
