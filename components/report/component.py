"""KFP component `report`: put the run's figures on one page."""

from typing import Any

from kfp import dsl

from components.command import run_step
from components.images import TRAIN


@dsl.container_component
def report(
    run_name: str,
    task_config: dict[str, Any],
    teacher_base: dict[str, Any],
    teacher: dict[str, Any],
    student_before: dict[str, Any],
    student_after: dict[str, Any],
    specdec_before: dict[str, Any],
    specdec_after: dict[str, Any],
    comet: dict[str, Any],
    distill_course: dict[str, Any],
    samples: dsl.Input[dsl.Artifact],
    predictions_teacher_base: dsl.Input[dsl.Artifact],
    predictions_teacher: dsl.Input[dsl.Artifact],
    predictions_student_before: dsl.Input[dsl.Artifact],
    predictions_student_after: dsl.Input[dsl.Artifact],
    html: dsl.Output[dsl.HTML],
    page: dsl.Output[dsl.Markdown],
    summary_json: dsl.Output[dsl.Artifact],
    summary: dsl.OutputPath(dict),
    tracking_uri: str = "",
    experiment: str = "skd",
) -> dsl.ContainerSpec:
    """Put the run's figures on one page.

    Teacher and student before and after, the student as draft model before and after, how the training went, and the
    sequences it trained on, token by token.

    Args:
        run_name: Name of the run.
        task_config: How an example becomes a prompt and an answer is judged (section `task`).
        teacher_base: Scores of the teacher before fine-tuning.
        teacher: Scores of the fine-tuned teacher.
        student_before: Scores of the student before distillation.
        student_after: Scores of the student after distillation.
        specdec_before: Draft figures before distillation.
        specdec_after: Draft figures after distillation.
        comet: COMET's scores of all models, or why they are missing.
        distill_course: Course of the distillation: losses, rejection rate and lengths by step.
        samples: Training sequences token by token, as `distill` wrote them; their metadata is the lineage.
        predictions_teacher_base: Answers of the teacher before fine-tuning.
        predictions_teacher: Answers of the fine-tuned teacher.
        predictions_student_before: Answers of the student before distillation.
        predictions_student_after: Answers of the student after distillation.
        tracking_uri: MLflow tracking server; empty turns tracking off.
        experiment: MLflow experiment.

    Returns:
        html: The page: one file that needs no network.
        page: The table, as Kubeflow's page shows it.
        summary_json: The same figures as JSON.
        summary: The same figures as a parameter.
    """
    return run_step(
        "report",
        TRAIN,
        {
            "run_name": run_name,
            "task_config": task_config,
            "teacher_base": teacher_base,
            "teacher": teacher,
            "student_before": student_before,
            "student_after": student_after,
            "specdec_before": specdec_before,
            "specdec_after": specdec_after,
            "comet": comet,
            "distill_course": distill_course,
            "samples": samples.path,
            "predictions_teacher_base": predictions_teacher_base.path,
            "predictions_teacher": predictions_teacher.path,
            "predictions_student_before": predictions_student_before.path,
            "predictions_student_after": predictions_student_after.path,
            "tracking_uri": tracking_uri,
            "experiment": experiment,
            "html_out": html.path,
            "summary_out": page.path,
            "summary_json_out": summary_json.path,
        },
    )
