"""A comparison on this machine: every run, and where some fail the table without them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from pipelines.graph import count_steps, read_steps, unrolled
from pipelines.local import LocalRun, RunFolder, run_pipeline
from pipelines.progress import Display
from skd_lib.compare.plan import OWN_PARAMETERS
from skd_lib.compare.trials import Trial
from skd_lib.config import RunConfig


def run_comparison(
    base: RunConfig,
    parameters: Mapping[str, Any],
    folder: RunFolder,
    documents: list[dict[str, Any]],
    display: Callable[[int], Display],
    *,
    say: Callable[[str], None],
    tracking_uri: str,
    experiment: str,
    fresh: bool = False,
) -> LocalRun:
    """Run the pipeline `compare_methods`.

    kfp ends a loop as failed if one of its rounds is, and what comes after it is left out. So where rounds have failed,
    the pipeline is run once more without them, which reuses all other steps, and the table tells why they are missing.

    Args:
        base: The configuration that all runs start from.
        parameters: Of the pipeline, see `skd_lib.compare.plan`.
        folder: The comparison's files.
        documents: The compiled pipeline.
        display: Makes what shows the course of so many steps.
        say: Tells a person what is being done.
        tracking_uri: MLflow.
        experiment: MLflow's experiment.
        fresh: Forget finished steps and checkpoints.

    Raises:
        StepFailed: a step that all runs need failed, or every run did.
        SkdError: the folder is in use, or the pipeline could not be run.
        KeyboardInterrupt: the running step was stopped.
    """
    trials = {Trial.model_validate(values).label: values for values in parameters["trials"]}
    failed: dict[str, str] = {}
    while True:
        left = [label for label in trials if label not in failed]
        steps = count_steps(unrolled(read_steps(documents[0]), left))
        say(f"comparison {base.name}: {len(left)} runs, {steps} steps, files in {folder.root}")
        finished = run_pipeline(
            base,
            folder,
            documents,
            display(steps),
            tracking_uri=tracking_uri,
            experiment=experiment,
            fresh=fresh and not failed,
            further={
                **{name: parameters[name] for name in OWN_PARAMETERS},
                "trials": [trials[label] for label in left],
                "failed": [{**trials[label], "reason": reason} for label, reason in failed.items()],
            },
            iterations=left,
        )
        if not finished.lost:
            return finished
        failed |= {label: failure.brief for label, failure in finished.lost.items()}
        if len(failed) == len(trials):
            raise next(iter(finished.lost.values()))
        say(f"{len(failed)} of {len(trials)} runs failed: the table is made without them")
