"""Step `scores`: two models' evaluations in one folder, and their scores side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from skd_lib.steps.inputs import present
from skd_lib.steps.runtime import StepIO, run_step


def main(
    before: Annotated[Path, typer.Option(help="Evaluation of a model before training: folder of step `evaluate`.")],
    after: Annotated[Path, typer.Option(help="Evaluation of the model after training.")],
    evaluations_out: Annotated[Path, typer.Option(help="Folder for both, each under the name of its role.")],
) -> None:
    """Put the evaluations of a model before and after training into one folder, and print the scores of both."""
    io = StepIO({"evaluations": evaluations_out})

    from skd_lib.console import Console
    from skd_lib.report.evaluations import merge_evaluations, read_evaluation
    from skd_lib.report.render import render
    from skd_lib.report.summary import Course, build_summary

    both = [read_evaluation(present(name, folder)) for name, folder in {"before": before, "after": after}.items()]
    merge_evaluations(both, evaluations_out)
    metric = next((name for each in both for name in each.scores.metrics), "")
    scores = {each.role: each.scores for each in both}
    Console().print(render(build_summary(task_metric=metric, scores=scores, specdec={}, course=Course())))
    io.write()


if __name__ == "__main__":
    run_step(main)
