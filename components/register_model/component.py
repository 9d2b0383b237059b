"""KFP component `register_model`: register the student in MLflow, by URI."""

from typing import Any

from kfp import dsl

from components.command import run_step
from components.images import TRAIN


@dsl.container_component
def register_model(
    student: dsl.Input[dsl.Model],
    registry_config: dict[str, Any],
    promote: str,
    reason: str,
    scores: dict[str, Any],
    comet: dict[str, Any],
    specdec_after: dict[str, Any],
    teacher: str,
    base_student: str,
    method: str,
    data_fingerprint: str,
    version: dsl.OutputPath(str),
    tracking_uri: str = "",
    experiment: str = "skd",
) -> dsl.ContainerSpec:
    """Register the student in MLflow, by URI.

    Idempotent: the same weights are registered once. Alias `challenger` always, `champion` only past the gate.

    Args:
        student: The student after distillation.
        registry_config: Section `registry` of the configuration.
        promote: The gate's decision, `true` or `false`.
        reason: The gate's reason.
        scores: Scores of the student after distillation.
        comet: COMET's scores of all models, or why they are missing.
        specdec_after: Draft figures after distillation.
        teacher: Lineage: the teacher's reference.
        base_student: Lineage: the student's reference; empty where it was cut from the teacher.
        method: Lineage: how the student was distilled.
        data_fingerprint: Lineage: fingerprint of the prepared data.
        tracking_uri: MLflow tracking server; empty turns tracking off.
        experiment: MLflow experiment.

    Returns:
        version: Version of the registered model.
    """
    return run_step(
        "register_model",
        TRAIN,
        {
            "student": student.path,
            "registry_config": registry_config,
            "promote": promote,
            "reason": reason,
            "scores": scores,
            "comet": comet,
            "specdec_after": specdec_after,
            "teacher": teacher,
            "base_student": base_student,
            "method": method,
            "data_fingerprint": data_fingerprint,
            "tracking_uri": tracking_uri,
            "experiment": experiment,
        },
    )
