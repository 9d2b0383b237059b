"""KFP component `compare_result`: what one run of a comparison came to."""

from typing import Any

from kfp import dsl

from components.command import run_step
from components.images import TRAIN


@dsl.container_component
def compare_result(
    trial: dict[str, Any],
    scores: dict[str, Any],
    course: dict[str, Any],
    draft: dict[str, Any],
    predictions: dsl.Input[dsl.Artifact],
    figures: dsl.Input[dsl.Metrics],
    result: dsl.Output[dsl.Artifact],
) -> dsl.ContainerSpec:
    """Put what the steps of one run of a comparison measured into one artifact.

    The table is made of these. Handed to it one by one, curves and scores of some dozens of runs are more than a
    command line may hold.

    Args:
        trial: The run: variant, seed, student init.
        scores: Scores of its student on the test set.
        course: Course of its training.
        draft: What its student is worth as a draft model; empty where that was not measured.
        predictions: Answers of its student to the test set.
        figures: Figures of its training.

    Returns:
        result: Folder with `result.json` and `predictions.jsonl`.
    """
    return run_step(
        "compare_result",
        TRAIN,
        {
            "trial": trial,
            "scores": scores,
            "course": course,
            "draft": draft,
            "predictions": predictions.path,
            "figures": figures.path,
            "result_out": result.path,
        },
    )
