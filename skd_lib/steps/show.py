"""Step `show`: print the contents of an artifact, for a person who watches the run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from skd_lib.errors import SkdError
from skd_lib.steps.runtime import present, run_step


def main(
    artifact: Annotated[Path, typer.Option(help="Folder of step `prepare_data`, `evaluate` or `evaluate_student`.")],
) -> None:
    """Show what an artifact holds: how many examples, or the scores of the models that were evaluated."""
    from skd_lib.data.prepared import MANIFEST, PreparedData
    from skd_lib.report.folders import SCORES

    present("artifact", artifact)
    if (artifact / MANIFEST).is_file():
        for name, rows in PreparedData.load(artifact).manifest["rows"].items():
            print(f"{name:<16} {rows:,} examples")
    elif (artifact / SCORES).is_file() or any(artifact.glob(f"*/{SCORES}")):
        _show_scores(artifact)
    else:
        raise SkdError(
            "holds neither prepared data nor evaluations",
            where=str(artifact),
            hint="name a folder of step `prepare_data`, `evaluate` or `evaluate_student`",
        )


def _show_scores(folder: Path) -> None:
    from skd_lib._core.terminal import Console
    from skd_lib.report.folders import SCORES, read_evaluation, read_evaluations
    from skd_lib.report.render import render
    from skd_lib.report.summary import build_summary

    if (folder / SCORES).is_file():
        one = read_evaluation(folder)
        found = {one.role: one}
    else:
        found = read_evaluations(folder)
    scores = {role: each.scores for role, each in found.items()}
    metric = next((name for each in scores.values() for name in each.metrics), "")
    Console().print(render(build_summary(task_metric=metric, scores=scores, specdec={})))


if __name__ == "__main__":
    run_step(main)
