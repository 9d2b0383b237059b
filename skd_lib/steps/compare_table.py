"""Step `compare_table`: all runs of a comparison in one table."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import typer
from pydantic import Field

from skd_lib.compare.result import TrialResult
from skd_lib.compare.trials import Trial
from skd_lib.config import EvaluationConfig, Section, TaskConfig, parse_section
from skd_lib.errors import SkdError
from skd_lib.report.summary import Course, Scores, Specdec
from skd_lib.steps.runtime import EXECUTOR_INPUT_HELP, StepIO, run_step


class FailedTrial(Trial):
    """A run without a model."""

    reason: str = Field(description="Why.")


class Finished(Section):
    """What the steps of the runs handed on, as lists in the same order."""

    trials: list[Trial]
    scores: list[Scores]
    courses: list[Course]
    drafts: list[dict[str, Any]] = Field([], description="Empty ones where nothing was measured.")
    failed: list[FailedTrial] = Field([], description="Runs without a model, in no list above.")


def main(
    trials: Annotated[str, typer.Option(help="The runs: a JSON list of {variant, seed, init, overrides}.")],
    scores: Annotated[str, typer.Option(help="Scores of their students: a JSON list of step `evaluate`'s, in order.")],
    page_out: Annotated[Path, typer.Option(help="Where the tables go: Markdown.")],
    runs_out: Annotated[Path, typer.Option(help="Where the runs go: CSV, one row each.")],
    comparison_out: Annotated[Path, typer.Option(help="Where all figures go: JSON.")],
    courses: Annotated[str, typer.Option(help="Courses of their trainings: a JSON list of step `distill`'s.")],
    predictions: Annotated[
        list[Path] | None, typer.Option(help="By hand: each run's predictions, in order; else from KFP.")
    ] = None,
    figures: Annotated[
        list[Path] | None, typer.Option(help="By hand: each run's figures of step `distill`, in order; else from KFP.")
    ] = None,
    drafts: Annotated[
        str, typer.Option(help="Their worth as drafts: a JSON list of step `specdec_benchmark`'s, or of empty ones.")
    ] = "[]",
    failed: Annotated[
        str, typer.Option(help="Runs that failed: a JSON list of the same, each with a `reason`.")
    ] = "[]",
    teacher: Annotated[str, typer.Option(help="Scores of the teacher: JSON of step `evaluate`.")] = "{}",
    reference: Annotated[str, typer.Option(help="The variant that the others are tested against.")] = "",
    run_name: Annotated[str, typer.Option(help="Name of the comparison.")] = "",
    config: Annotated[str, typer.Option(help="Section `evaluation` of the run's config, as JSON.")] = "{}",
    task_config: Annotated[str, typer.Option(help="Section `task` of the run's config, as JSON.")] = "{}",
    seed: Annotated[int, typer.Option(min=0, help="Seed of the bootstrap.")] = 0,
    tracking_uri: Annotated[str, typer.Option(help="MLflow tracking URI; empty: no tracking.")] = "",
    experiment: Annotated[str, typer.Option(help="MLflow experiment.")] = "skd",
    executor_input: Annotated[str | None, typer.Option(help=EXECUTOR_INPUT_HELP)] = None,
) -> None:
    """Means over seeds with intervals, paired tests against the reference, and what each variant cost.

    The means go to the pipeline's MLflow run too, as `VARIANT/METRIC`.
    """
    settings = parse_section(EvaluationConfig, config, where="--config")
    task = parse_section(TaskConfig, task_config, where="--task-config")
    given = {"trials": trials, "scores": scores, "courses": courses, "drafts": drafts, "failed": failed}
    finished = parse_section(Finished, {name: json.loads(text) for name, text in given.items()}, where="the runs")
    teacher_scores = parse_section(Scores, teacher, where="--teacher").metrics
    io = StepIO(executor_input, {"page": page_out, "runs": runs_out, "comparison": comparison_out})
    answers = predictions or [path for path, _ in io.input_list("predictions")]
    numbers = [json.loads(path.read_text(encoding="utf-8")) for path in figures or []] or [
        metadata for _, metadata in io.input_list("figures")
    ]
    measured = finished.drafts or [{} for _ in finished.trials]
    counts = {len(each) for each in (finished.trials, finished.scores, finished.courses, measured, answers, numbers)}
    if len(counts) > 1:
        raise SkdError(
            f"the lists of the {len(finished.trials)} runs have different lengths: {sorted(counts)}",
            hint="give scores, course, predictions and figures of every run, in the order of the runs",
        )

    from rich.console import Console

    from skd_lib.compare.build import build_comparison
    from skd_lib.compare.render import render, to_csv, to_markdown
    from skd_lib.evaluation.predictions import read_predictions
    from skd_lib.storage import write_text_atomic
    from skd_lib.tracking.runs import step_run

    with step_run(
        step="compare_table", tracking_uri=tracking_uri, experiment=experiment, run_name=run_name or None
    ) as run:
        done = [
            _result(trial, each, course, draft, number)
            for trial, each, course, draft, number in zip(
                finished.trials, finished.scores, finished.courses, measured, numbers, strict=True
            )
        ]
        lost = [
            TrialResult(variant=each.variant, seed=each.seed, init=each.init, reason=each.reason)
            for each in finished.failed
        ]
        comparison = build_comparison(
            name=run_name,
            reference=reference or finished.trials[0].variant,
            metrics=task.own_metrics,
            trials=[*done, *lost],
            answers={
                (trial.variant, trial.seed): read_predictions(path)
                for trial, path in zip(finished.trials, answers, strict=True)
            },
            teacher=teacher_scores,
            resamples=settings.bootstrap_samples,
            seed=seed,
        )
        markdown, rows = to_markdown(comparison), to_csv(comparison)
        write_text_atomic(page_out, markdown)
        write_text_atomic(runs_out, rows)
        write_text_atomic(comparison_out, comparison.to_json())
        run.parent.log_metrics(comparison.headline())
        for text, name in ((markdown, "comparison.md"), (rows, "runs.csv"), (comparison.to_json(), "comparison.json")):
            run.parent.log_text(text, name)
    Console().print(render(comparison))

    io.metadata("comparison", **comparison.headline())
    io.write()


def _result(
    trial: Trial, scores: Scores, course: Course, draft: dict[str, Any], figures: dict[str, Any]
) -> TrialResult:
    numbers = {name: float(value) for name, value in figures.items() if isinstance(value, int | float)}
    return TrialResult(
        variant=trial.variant,
        seed=trial.seed,
        init=trial.init,
        scores=scores,
        rejection_rate=fmean(course.rejection_rate) if course.rejection_rate else None,
        tokens_per_teacher_call=numbers.pop("tokens_per_teacher_call_last_tenth", None),
        draft=parse_section(Specdec, draft, where="--drafts").figures() if draft else {},
        figures=numbers,
        course=course,
    )


if __name__ == "__main__":
    run_step(main)
