"""KFP component `compare_variant`: the parts of the configuration that one run of a comparison has for itself."""

from kfp import dsl

from skd_kfp.components.command import run_step
from skd_kfp.components.images import TRAIN


@dsl.container_component
def compare_variant(
    trial: str,
    config: str,
    model_fingerprints: str,
    student_init: dsl.OutputPath(str),
    distill: dsl.OutputPath(str),
    evaluate: dsl.OutputPath(str),
    specdec_benchmark: dsl.OutputPath(str),
) -> dsl.ContainerSpec:
    """Hand each step of one run of a comparison its own part of the configuration.

    As `preflight` does for a single run: a step's cache key depends on that part alone.

    Args:
        trial: The run: variant, seed, student init, and the fields in which it differs from `config`.
        config: The configuration that all runs start from.
        model_fingerprints: Fingerprints of the models, from preflight, by reference, as JSON.

    Returns:
        student_init: The `config` of that step, with this run's student, seed and label.
        distill: The `config` of that step, likewise.
        evaluate: The `config` of that step: as for all runs, with this run's label.
        specdec_benchmark: The `config` of that step, likewise.
    """
    return run_step(
        "compare_variant",
        TRAIN,
        {"trial": trial, "config": config, "model_fingerprints": model_fingerprints},
        {
            "student_init": student_init,
            "distill": distill,
            "evaluate": evaluate,
            "specdec_benchmark": specdec_benchmark,
        },
    )
