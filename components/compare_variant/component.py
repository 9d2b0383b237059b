"""KFP component `compare_variant`: the sections of the configuration that one run of a comparison has for itself."""

from kfp import dsl

from components.command import run_step
from components.images import TRAIN


@dsl.container_component
def compare_variant(
    trial: str,
    config: str,
    model_fingerprints: str,
    student: dsl.OutputPath(str),
    student_fingerprint: dsl.OutputPath(str),
    seed: dsl.OutputPath(int),
    student_init_config: dsl.OutputPath(str),
    distill_config: dsl.OutputPath(str),
    label: dsl.OutputPath(str),
) -> dsl.ContainerSpec:
    """Hand each step of one run of a comparison its own section of the configuration.

    As `preflight` does for a single run: a step's cache key depends on that section alone.

    Args:
        trial: The run: variant, seed, student init, and the fields in which it differs from `config`.
        config: The configuration that all runs start from.
        model_fingerprints: Fingerprints of the models, from preflight, by reference, as JSON.

    Returns:
        student: Student of this run; empty where it is cut from the teacher.
        student_fingerprint: Fingerprint of this student; empty where it is cut from the teacher.
        seed: Seed of this run.
        student_init_config: Section `student_init` of its configuration.
        distill_config: Section `distill` of its configuration.
        label: Name of the run in the comparison.
    """
    return run_step(
        "compare_variant",
        TRAIN,
        {"trial": trial, "config": config, "model_fingerprints": model_fingerprints},
        {
            "student": student,
            "student_fingerprint": student_fingerprint,
            "seed": seed,
            "student_init_config": student_init_config,
            "distill_config": distill_config,
            "label": label,
        },
    )
