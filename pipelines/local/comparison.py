"""Run a comparison on this machine: every trial, and a table without the trials that failed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from skd_kfp.pipelines.graph import read_steps, unrolled
from skd_kfp.pipelines.local.folder import RunFolder
from skd_kfp.pipelines.local.progress import Display
from skd_kfp.pipelines.local.runner import LocalRun, run_pipeline
from skd_lib.comparison.plan import Plan


def run_comparison(
    plan: Plan,
    folder: RunFolder,
    documents: list[dict[str, Any]],
    display: Callable[[int], Display],
    *,
    say: Callable[[str], None],
    tracking_uri: str,
    experiment: str,
    fresh: bool = False,
) -> LocalRun:
    """Run the pipeline `compare_methods`; `display` makes the display for a number of steps.

    kfp ends a loop as failed if one of its rounds failed, and leaves out what comes after it. In this case the pipeline
    is run once more without the failed rounds: it reuses all other steps, and the table says why rounds are missing.
    """
    failed: dict[str, str] = {}
    while True:
        left = plan.without(failed)
        steps = len(unrolled(read_steps(documents[0]), [trial.label for trial in left.trials]))
        say(f"comparison {plan.base.name}: {len(left.trials)} runs, {steps} steps, files in {folder.root}")
        finished = run_pipeline(
            plan.base,
            folder,
            documents,
            display(steps),
            tracking_uri=tracking_uri,
            experiment=experiment,
            fresh=fresh and not failed,
            comparison=left,
        )
        if not finished.lost:
            return finished
        failed |= {label: failure.brief for label, failure in finished.lost.items()}
        if len(failed) == len(plan.trials):
            raise next(iter(finished.lost.values()))
        say(f"{len(failed)} of {len(plan.trials)} runs failed: the table is made without them")
