"""Step `register_model`: the student in MLflow's registry, with its lineage."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from skd_lib.config import parse_section
from skd_lib.models.files import weights_digest
from skd_lib.steps.gate import MEASURED_HELP
from skd_lib.steps.inputs import present
from skd_lib.steps.options import Experiment, TrackingUri
from skd_lib.steps.runtime import StepIO, run_step

log = logging.getLogger(__name__)
LINEAGE = (
    *("teacher", "teacher_fingerprint", "teacher_weights_sha256"),
    *("base_student", "base_student_fingerprint", "initial_weights_sha256", "student_init"),
    *("method", "divergence", "beta", "alpha", "teacher_signal"),
    *("rule", "top_k", "min_prob", "mixture", "gamma", "replaced_weight", "on_policy_fraction", "sampled_fraction"),
    *("precision", "data_fingerprint", "code_version", "pipeline_run_id"),
)
"""Fields of a student's record that become tags of its version; others stay in its folder."""


class Answer(StrEnum):
    """The gate's decision, as a pipeline parameter holds it."""

    yes = "true"
    no = "false"


def main(
    student: Annotated[Path, typer.Option(help="Folder of the student, in Hugging Face layout.")],
    measured: Annotated[str, typer.Option(help=MEASURED_HELP)],
    promote: Annotated[
        Answer, typer.Option(help="Whether it becomes the champion: output of step `gate`.", case_sensitive=False)
    ],
    reason: Annotated[str, typer.Option(help="The gate's reason.")] = "",
    tracking_uri: TrackingUri = "",
    experiment: Experiment = "skd",
) -> None:
    """Register the student by URI and digest of its weights: the same weights are registered once.

    It gets the alias `challenger`, and `champion` where the gate said so. Its lineage comes from the record that its
    training left in its folder, and names the run that trained it. A registry that does not answer is waited for, for
    `SKD_REGISTRY_WAIT` seconds. Output parameter `version`; empty without tracking.
    """
    from skd_lib.records import read_record
    from skd_lib.report.measured import Measured
    from skd_lib.tracking import registry
    from skd_lib.tracking.runs import step_run

    found = parse_section(Measured, measured, where="--measured")
    settings, figures = found.registry, {**found.student, **found.draft}
    io = StepIO({})
    record = read_record(present("student", student))
    digest = weights_digest(student)
    tags = {
        **version_tags(record.lineage),
        **{f"{registry.SIGNATURE_PREFIX}{name}": text for name, text in found.signatures.items()},
        registry.GATE_TAG: reason,
    }
    uri = io.input_uri("student", student)

    with step_run(
        step="register_model",
        tracking_uri=tracking_uri,
        experiment=experiment,
        params={"registry": settings.model_dump(), "promote": promote.value},
    ) as run:
        version = ""
        if tracking_uri:
            version = registry.register(
                tracking_uri=tracking_uri,
                model_name=settings.model_name,
                student_uri=uri,
                weights_sha256=digest,
                trained_by=record.mlflow_run_id,
                run_id=run.parent.find,
                promote=promote is Answer.yes,
                figures=figures,
                tags=tags,
                description=_description(tags, figures, reason),
                patience=registry.step_patience(),
            )
            outcome = {
                "registered_model": f"{settings.model_name}/{version}",
                "champion": promote.value,
                "student_uri": uri,
                "student_weights_sha256": digest,
            }
            run.set_tags(outcome)
            run.parent.set_tags(outcome)
        else:
            log.warning("tracking is off: the student stays unregistered at %s", uri)
    if version:
        aliases = "challenger and champion" if promote is Answer.yes else "challenger"
        print(f"registered as {settings.model_name} version {version} ({aliases})")

    io.parameter("version", version)
    io.write()


def version_tags(lineage: Mapping[str, Any]) -> dict[str, str]:
    """Return what a version tells of its training: the fields that are known here, as texts."""
    return {name: str(lineage[name]) for name in LINEAGE if lineage.get(name) not in (None, "")}


def _description(tags: Mapping[str, str], figures: Mapping[str, float], reason: str) -> str:
    teacher = tags.get("teacher") or "its teacher"
    method = tags.get("method") or "distillation"
    shown = ", ".join(f"{name} {value:.4g}" for name, value in figures.items())
    return f"Student of {teacher} by {method}. {shown}. {reason}".strip()


if __name__ == "__main__":
    run_step(main)
