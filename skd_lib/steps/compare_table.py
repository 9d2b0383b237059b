"""Step `compare_table`: all runs of a comparison in one table."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from pydantic import Field

from skd_lib.compare.result import TrialResult
from skd_lib.compare.trials import Trial
from skd_lib.config import EvaluationConfig, Section, TaskConfig, parse_json, parse_section
from skd_lib.errors import SkdError
from skd_lib.report.summary import Scores
from skd_lib.steps.runtime import EXECUTOR_INPUT_HELP, StepIO, run_step


class FailedTrial(Trial):
    """A run without a model."""

    reason: str = Field(description="Why.")

    def result(self) -> TrialResult:
        """As a row of the table."""
        return TrialResult(variant=self.variant, seed=self.seed, init=self.init, reason=self.reason)


class Failures(Section):
    """All of them."""

    failed: list[FailedTrial]


def main(
    page_out: Annotated[Path, typer.Option(help="Where the tables go: Markdown.")],
    runs_out: Annotated[Path, typer.Option(help="Where the runs go: CSV, one row each.")],
    comparison_out: Annotated[Path, typer.Option(help="Where all figures go: JSON.")],
    results: Annotated[
        list[Path] | None, typer.Option(help="By hand: the folder of step `compare_result` of each run; else from KFP.")
    ] = None,
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
    lost = parse_section(Failures, {"failed": parse_json(failed, where="--failed")}, where="--failed").failed
    teacher_scores = parse_section(Scores, teacher, where="--teacher").metrics
    io = StepIO(executor_input, {"page": page_out, "runs": runs_out, "comparison": comparison_out})
    folders = results or [path for path, _ in io.input_list("results")]
    if not folders:
        raise SkdError("there is no run to compare", where="--results", hint="name the folder of one run or more")

    from skd_lib.compare.build import build_comparison
    from skd_lib.compare.folder import read_result
    from skd_lib.compare.render import render, to_csv, to_markdown
    from skd_lib.console import Console
    from skd_lib.storage import write_text_atomic
    from skd_lib.tracking.runs import step_run

    with step_run(
        step="compare_table", tracking_uri=tracking_uri, experiment=experiment, run_name=run_name or None
    ) as run:
        finished = [read_result(folder) for folder in folders]
        done = [result for result, _ in finished]
        comparison = build_comparison(
            name=run_name,
            reference=reference or done[0].variant,
            metrics=task.own_metrics,
            trials=[*done, *(each.result() for each in lost)],
            answers={(result.variant, result.seed): answers for result, answers in finished},
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


if __name__ == "__main__":
    run_step(main)
