"""Step `report`: the run's figures on one page, for people, for Kubeflow, for MLflow and for programs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from skd_lib.config import TaskConfig, parse_section
from skd_lib.steps.runtime import EXECUTOR_INPUT_HELP, StepIO, run_step

PREDICTIONS_HELP = "Its answers: JSONL of step `evaluate`."


def main(
    html_out: Annotated[Path, typer.Option(help="Where the page goes: HTML.")],
    summary_out: Annotated[Path, typer.Option(help="Where the table goes: Markdown.")],
    summary_json_out: Annotated[Path, typer.Option(help="Where the figures go: JSON.")],
    run_name: Annotated[str, typer.Option(help="Name of the run.")] = "",
    task_config: Annotated[str, typer.Option(help="Section `task` of the run's config, as JSON.")] = "{}",
    teacher_base: Annotated[str, typer.Option(help="Scores of the teacher as it came: JSON of step `evaluate`.")] = "",
    teacher: Annotated[str, typer.Option(help="Scores of the fine-tuned teacher.")] = "",
    student_before: Annotated[str, typer.Option(help="Scores of the student before distillation.")] = "",
    student_after: Annotated[str, typer.Option(help="Scores of the student after distillation.")] = "",
    specdec_before: Annotated[
        str, typer.Option(help="The student as draft before distillation: JSON of step `specdec_benchmark`.")
    ] = "",
    specdec_after: Annotated[str, typer.Option(help="The student as draft after distillation.")] = "",
    distill_course: Annotated[
        str, typer.Option(help="Course of the training: JSON with steps, rejection_rate, validation_steps, ...")
    ] = "",
    comet: Annotated[str, typer.Option(help="COMET's scores of all models: JSON of step `comet_score`.")] = "",
    samples: Annotated[Path | None, typer.Option(help="Training sequences: JSONL of step `distill`.")] = None,
    predictions_teacher_base: Annotated[Path | None, typer.Option(help=PREDICTIONS_HELP)] = None,
    predictions_teacher: Annotated[Path | None, typer.Option(help=PREDICTIONS_HELP)] = None,
    predictions_student_before: Annotated[Path | None, typer.Option(help=PREDICTIONS_HELP)] = None,
    predictions_student_after: Annotated[Path | None, typer.Option(help=PREDICTIONS_HELP)] = None,
    tracking_uri: Annotated[str, typer.Option(help="MLflow tracking URI; empty: no tracking.")] = "",
    experiment: Annotated[str, typer.Option(help="MLflow experiment.")] = "skd",
    executor_input: Annotated[str | None, typer.Option(help=EXECUTOR_INPUT_HELP)] = None,
) -> None:
    """Put the figures of evaluation and benchmark together; what was not measured may be left out.

    The headline figures (`student_after_chrf`, `speedup_after`, ...) go to the pipeline's MLflow run, so that runs can
    be compared there, with the page, the figures and the training sequences as its artifacts, from which `skd report`
    makes the page again. Output parameter `summary`: the content of the JSON file.
    """
    from skd_lib.console import Console
    from skd_lib.evaluation.predictions import paired_results
    from skd_lib.report.answers import answer_lengths
    from skd_lib.report.lineage import lineage
    from skd_lib.report.page import render_page
    from skd_lib.report.render import render, to_markdown
    from skd_lib.report.samples import read_samples, to_jsonl
    from skd_lib.report.sources import PAGE, SAMPLES, SUMMARY
    from skd_lib.report.summary import Comet, Comparison, Course, Moment, Role, Scores, Specdec, build_summary
    from skd_lib.storage import write_text_atomic
    from skd_lib.tracking.runs import step_run

    task = parse_section(TaskConfig, task_config, where="--task-config")
    given: dict[Role, str] = {
        "teacher_base": teacher_base,
        "teacher": teacher,
        "student_before": student_before,
        "student_after": student_after,
    }
    scores = {role: parse_section(Scores, text, where=_option(role)) for role, text in given.items() if _there(text)}
    drafts: dict[Moment, str] = {"before": specdec_before, "after": specdec_after}
    specdec = {
        moment: parse_section(Specdec, text, where=f"--specdec-{moment}")
        for moment, text in drafts.items()
        if _there(text)
    }
    course = parse_section(Course, distill_course or "{}", where="--distill-course")
    judged = parse_section(Comet, comet or "{}", where="--comet")
    answers: dict[Role, Path | None] = {
        "teacher_base": predictions_teacher_base,
        "teacher": predictions_teacher,
        "student_before": predictions_student_before,
        "student_after": predictions_student_after,
    }
    predictions = {role: path for role, path in answers.items() if path is not None}
    sequences = [] if samples is None else read_samples(samples)
    io = StepIO(executor_input, {"html": html_out, "page": summary_out, "summary_json": summary_json_out})

    trained = io.input_metadata("samples")
    with step_run(step="report", tracking_uri=tracking_uri, experiment=experiment, run_name=run_name or None) as run:
        summary = build_summary(
            task_metric=task.metrics[0],
            scores=scores,
            specdec=specdec,
            course=course,
            comet=judged,
            comparisons=[Comparison.model_validate(row) for row in paired_results(dict(predictions.items()))],
            lengths=answer_lengths(predictions),
            lineage=lineage(trained),
            losses=trained.get("losses"),
            run_name=run_name,
            pipeline_run_id=os.environ.get("KFP_RUN_ID", ""),
            mlflow_run_id=run.parent.run_id,
            mlflow_url=run.parent.url,
        )
        page, markdown = render_page(summary, sequences), to_markdown(summary)
        write_text_atomic(html_out, page)
        write_text_atomic(summary_out, markdown)
        summary.write(summary_json_out)
        run.parent.log_metrics(summary.headline())
        run.parent.set_tags({f"signature.{name}": text for name, text in summary.signatures.items()})
        run.parent.log_text(summary.to_json(), SUMMARY)
        run.parent.log_text(markdown, "summary.md")
        run.parent.log_text(to_jsonl(sequences), SAMPLES)
        run.parent.log_text(page, PAGE)
    Console().print(render(summary))

    io.metadata("summary_json", **summary.headline())
    io.parameter("summary", summary.to_dict())
    io.write()


def _there(text: str) -> bool:
    return text.strip() not in ("", "{}", "null")


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


if __name__ == "__main__":
    run_step(main)
