"""Step `report`: the run's figures on one page, for people, for Kubeflow, for MLflow and for programs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from skd_lib._core.machine import pipeline_run_id
from skd_lib.config import parse_section
from skd_lib.config.step import STEP_HELP, StepConfig
from skd_lib.steps.runtime import Experiment, StepIO, TrackingUri, present, run_step

if TYPE_CHECKING:
    from skd_lib.report.folders import Evaluated
    from skd_lib.results import Comet, Role

WITHOUT_COMET = (
    "this pipeline has no step for COMET: start its version with COMET (compiled/distillation_comet.yaml), which takes "
    "all that is done from the cache"
)


def main(
    report_out: Annotated[Path, typer.Option(help="Where the page goes: HTML.")],
    figures_out: Annotated[Path, typer.Option(help="Where all figures go: JSON.")],
    config: Annotated[str, typer.Option(help=STEP_HELP)] = "{}",
    teacher_evaluations: Annotated[
        Path | None, typer.Option(help="The teacher before and after fine-tuning: folder of step `evaluate_teacher`.")
    ] = None,
    student_evaluations: Annotated[
        Path | None, typer.Option(help="The student before and after distillation, likewise.")
    ] = None,
    drafts: Annotated[
        Path | None, typer.Option(help="The student as draft before and after: folder of step `specdec_benchmark`.")
    ] = None,
    champion: Annotated[
        Path | None, typer.Option(help="The registered champion: folder of step `evaluate_champion`.")
    ] = None,
    comet: Annotated[
        str,
        typer.Option(help="COMET's scores of all models: JSON of step `comet_score`; empty without such a step."),
    ] = "",
    tracking_uri: TrackingUri = "",
    experiment: Experiment = "skd",
) -> None:
    """Put the figures of evaluation and benchmark together; what was not measured may be left out.

    The headline figures (`student_after/chrf`, `draft_after/speedup`, ...) go to the pipeline's MLflow run, so that
    runs can be compared there, with the models and their data, and with the page, the figures and the training
    sequences as its artifacts, from which `skd report` makes the page again. A few of the figures, rounded, are what
    Kubeflow's page compares runs by. Output parameter `measured`: what step `register_model` needs
    (`skd_lib.report.measured`).
    """
    from skd_lib._core.terminal import Console
    from skd_lib.evaluation.predictions import paired_results
    from skd_lib.models.records import SAMPLES, read_record, to_jsonl
    from skd_lib.report.folders import read_drafts
    from skd_lib.report.measured import measured, read_champion
    from skd_lib.report.page import render_page
    from skd_lib.report.render import render, to_markdown
    from skd_lib.report.sources import PAGE, SUMMARY
    from skd_lib.report.summary import answer_lengths, build_summary, headline_columns, lineage_in_words
    from skd_lib.report.tracked import description, model_records
    from skd_lib.results import Scores
    from skd_lib.storage import write_text_atomic
    from skd_lib.tracking.gate import Rival
    from skd_lib.tracking.runs import step_run

    settings = parse_section(StepConfig, config, where="--config")
    task, run_name = settings.task, settings.name
    judged = _judged(comet, wanted=task.wants_comet)
    evaluated = _evaluated({"teacher_evaluations": teacher_evaluations, "student_evaluations": student_evaluations})
    scores = {role: each.scores for role, each in evaluated.items()}
    predictions = {role: each.predictions for role, each in evaluated.items()}
    specdec = {} if drafts is None else read_drafts(present("drafts", drafts))[1]
    rival = Rival() if champion is None else read_champion(present("champion", champion))
    student = evaluated.get("student_after")
    record = read_record(student.folder if student else Path())
    io = StepIO({"report": report_out, "figures": figures_out})

    with step_run(step="report", tracking_uri=tracking_uri, experiment=experiment, run_name=run_name or None) as run:
        summary = build_summary(
            task_metric=task.metrics[0],
            scores=scores,
            specdec=specdec,
            course=record.course,
            comet=judged,
            comparisons=paired_results(predictions),
            lengths=answer_lengths(predictions),
            lineage=lineage_in_words(record.lineage),
            losses=record.lineage.get("losses"),
            run_name=run_name,
            pipeline_run_id=pipeline_run_id(),
            mlflow_run_id=run.parent.run_id,
            mlflow_url=run.parent.url,
            mlflow_table_url=run.parent.table_url,
        )
        samples = record.samples()
        page = render_page(summary, samples)
        write_text_atomic(report_out, page)
        summary.write(figures_out)
        run.parent.log_metrics(summary.headline())
        run.parent.show_metrics([name for name in headline_columns(task.metrics) if name in summary.headline()])
        data = student.scores.data if student else []
        for used in data:
            run.parent.log_dataset(**used.model_dump())
        tested = next(((used.name, used.digest) for used in data if used.context == "test"), None)
        run.log_models(model_records(evaluated, summary), tested)
        run.parent.set_tags({"mlflow.note.content": description(summary, run.parent.page)})
        run.parent.set_tags({f"signature.{name}": text for name, text in summary.signatures.items()})
        run.parent.log_text(summary.to_json(), SUMMARY)
        run.parent.log_text(to_markdown(summary), "summary.md")
        run.parent.log_text(to_jsonl(samples), SAMPLES)
        run.parent.log_text(page, PAGE)
    Console().print(render(summary))

    of_student = scores.get("student_after", Scores())
    draft, before = specdec.get("after"), summary.score_lost()
    handed_on = measured(task.metrics[0], of_student, draft, rival, judged, settings.registry, before)
    io.metrics("figures", summary.figures())
    io.parameter("measured", handed_on.to_parameter())
    io.write()


def _judged(comet: str, *, wanted: bool) -> Comet:
    from skd_lib.results import Comet

    if comet:
        return parse_section(Comet, comet, where="--comet")
    return Comet(missing=WITHOUT_COMET if wanted else "")


def _evaluated(folders: dict[str, Path | None]) -> dict[Role, Evaluated]:
    from skd_lib.report.folders import read_evaluations

    found: dict[Role, Evaluated] = {}
    for name, folder in folders.items():
        found |= {} if folder is None else read_evaluations(present(name, folder))
    return found


if __name__ == "__main__":
    run_step(main)
