"""KFP component `register_model`: register the student in MLflow, by URI."""

from kfp import dsl

from components.command import run_step
from components.images import TRAIN


@dsl.container_component
def register_model(
    student: dsl.Input[dsl.Model],
    measured: str,
    promote: str,
    reason: str,
    version: dsl.OutputPath(str),
) -> dsl.ContainerSpec:
    """Register the student in MLflow, by URI.

    Idempotent: the same weights are registered once. Alias `challenger` always, `champion` only past the gate. Its
    lineage names the run that trained it, also where this run took it from the cache.

    Args:
        student: The student after distillation.
        measured: The student as measured, and section `registry`, from `report`.
        promote: The gate's decision, `true` or `false`.
        reason: The gate's reason.

    Returns:
        version: Version of the registered model.
    """
    return run_step(
        "register_model",
        TRAIN,
        {
            "student": student.path,
            "measured": measured,
            "promote": promote,
            "reason": reason,
        },
        {"version": version},
        {"student": student},
    )
