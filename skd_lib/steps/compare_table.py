"""Step `compare_table`: all trials of a comparison in one table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from skd_lib.config import parse_section
from skd_lib.config.step import STEP_HELP, StepConfig
from skd_lib.errors import SkdError
from skd_lib.steps.runtime import Experiment, StepIO, TrackingUri, present, run_step


def main(
    report_out: Annotated[Path, typer.Option(help="Where the tables go: Markdown.")],
    page_out: Annotated[Path, typer.Option(help="Where the page with the charts goes: HTML.")],
    figures_out: Annotated[Path, typer.Option(help="Where the headline figures go: JSON.")],
    comparison_out: Annotated[
        Path, typer.Option(help="Folder for all figures, comparison.json, and one row a trial, runs.csv.")
    ],
    evaluations: Annotated[
        list[Path] | None, typer.Option(help="By hand: each student's folder of step `evaluate`; else from KFP.")
    ] = None,
    drafts: Annotated[
        list[Path] | None, typer.Option(help="By hand: each student's folder of `specdec_benchmark`; else from KFP.")
    ] = None,
    teacher_evaluations: Annotated[
        Path | None, typer.Option(help="The teacher before and after fine-tuning: folder of step `evaluate_teacher`.")
    ] = None,
    config: Annotated[str, typer.Option(help=STEP_HELP)] = "{}",
    plan: Annotated[
        str, typer.Option(help="The comparison, as JSON: reference, trials, and those left out: skipped.")
    ] = "{}",
    tracking_uri: TrackingUri = "",
    experiment: Experiment = "skd",
) -> None:
    """Means over seeds with intervals, paired tests against the reference, and what each variant cost.

    Evaluations and drafts belong to the trial whose label they hold, in whatever order they come. The means go to the
    pipeline's MLflow run too, as `VARIANT/METRIC`.
    """
    from skd_lib.comparison.table import TableConfig, collect

    table = parse_section(TableConfig, plan, where="--plan")
    settings = parse_section(StepConfig, config, where="--config")
    io = StepIO({"report": report_out, "page": page_out, "figures": figures_out, "comparison": comparison_out})
    folders = evaluations or io.input_paths("evaluations")
    if not folders:
        raise SkdError("there is no trial to compare", where="--evaluations", hint="name the folder of one or more")

    from skd_lib._core.terminal import Console
    from skd_lib.comparison.page import PAGE, render_page
    from skd_lib.comparison.render import render, to_csv, to_markdown
    from skd_lib.comparison.table import COMPARISON, build_comparison
    from skd_lib.report.folders import read_evaluations
    from skd_lib.storage import write_text_atomic
    from skd_lib.tracking.runs import step_run

    with step_run(
        step="compare_table", tracking_uri=tracking_uri, experiment=experiment, run_name=settings.name or None
    ) as run:
        results, answers = collect(
            table,
            [present("evaluations", folder) for folder in folders],
            [present("drafts", folder) for folder in drafts or io.input_paths("drafts")],
        )
        teachers = {} if teacher_evaluations is None else read_evaluations(present("teacher", teacher_evaluations))
        comparison = build_comparison(
            name=settings.name,
            reference=table.reference or results[0].variant,
            metrics=settings.task.own_metrics,
            trials=results,
            answers=answers,
            teacher=teachers["teacher"].scores.metrics if "teacher" in teachers else {},
            resamples=settings.evaluation.bootstrap_samples,
            seed=settings.seed,
        )
        texts = {COMPARISON: comparison.to_json(), "runs.csv": to_csv(comparison)}
        comparison_out.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            write_text_atomic(comparison_out / name, text)
        markdown, page = to_markdown(comparison), render_page(comparison)
        write_text_atomic(page_out, page)
        write_text_atomic(report_out, markdown)
        write_text_atomic(figures_out, json.dumps(comparison.figures(), indent=2) + "\n")
        run.parent.log_metrics(comparison.headline())
        first = settings.task.own_metrics[:1]
        run.parent.show_metrics([name for name in comparison.headline() if name.rpartition("/")[2] in first])
        for name, text in {"comparison.md": markdown, PAGE: page, **texts}.items():
            run.parent.log_text(text, name)
    Console().print(render(comparison))

    io.metrics("figures", comparison.figures())
    io.write()


if __name__ == "__main__":
    run_step(main)
