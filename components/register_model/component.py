"""KFP component `register_model`: decide whether the student becomes the champion, and register it in MLflow."""

from kfp import dsl

from skd_kfp.components.command import run_step
from skd_kfp.components.images import TRAIN


@dsl.container_component
def register_model(student: dsl.Input[dsl.Model], measured: str) -> dsl.ContainerSpec:
    """Register the student in MLflow, by URI, as the champion where it is good enough.

    It is where no champion exists, or where it beats the champion's task metric by the margin the section `registry`
    asks for and is not slower as a draft than it allows, both measured by this run. Idempotent: the same weights are
    registered once. Alias `challenger` always, `champion` only where decided so. Its lineage names the run that trained
    it, also where this run took it from the cache.

    Args:
        student: The student after distillation.
        measured: The student and the champion as measured, and section `registry`, from `report`.
    """
    return run_step("register_model", TRAIN, {"student": student.path, "measured": measured}, {})
