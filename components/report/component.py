"""KFP component `report`: put the run's figures on one page."""

from kfp import dsl

from skd_kfp.components.command import run_step
from skd_kfp.components.images import TRAIN


@dsl.container_component
def report(
    config: str,
    teacher_evaluations: dsl.Input[dsl.Artifact],
    student_evaluations: dsl.Input[dsl.Artifact],
    drafts: dsl.Input[dsl.Artifact],
    champion: dsl.Input[dsl.Artifact],
    comet: str,
    report: dsl.Output[dsl.HTML],
    figures: dsl.Output[dsl.Metrics],
    measured: dsl.OutputPath(str),
) -> dsl.ContainerSpec:
    """Put the run's figures on one page.

    Teacher and student before and after, the student as draft model before and after, how the training went, and the
    sequences it trained on, token by token.

    Args:
        config: The run's settings that this step depends on, as JSON: `name`, `task`, `registry`.
        teacher_evaluations: The teacher before and after fine-tuning, as `evaluate_teacher` wrote it.
        student_evaluations: The student before and after distillation, likewise.
        drafts: The student as draft before and after, as `specdec_benchmark` wrote it.
        champion: The registered champion, as `evaluate_champion` wrote it.
        comet: COMET's scores of all models, or why they are missing; empty in a pipeline without `comet_score`.

    Returns:
        report: The page: one file that needs no network.
        figures: The headline figures, by which runs are compared; as a file, all figures as JSON.
        measured: What the registry needs to decide.
    """
    return run_step(
        "report",
        TRAIN,
        {
            "config": config,
            "teacher_evaluations": teacher_evaluations.path,
            "student_evaluations": student_evaluations.path,
            "drafts": drafts.path,
            "champion": champion.path,
            "comet": comet,
            "report_out": report.path,
            "figures_out": figures.path,
        },
        {"report": report, "figures": figures, "measured": measured},
    )
