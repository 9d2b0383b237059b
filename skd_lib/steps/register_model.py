"""Step `register_model`: the student in MLflow's registry, with its lineage."""

from __future__ import annotations

import logging
import os
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from skd_lib.config import RegistryConfig, parse_section
from skd_lib.errors import SkdError
from skd_lib.models.files import weights_digest
from skd_lib.steps.runtime import EXECUTOR_INPUT_HELP, StepIO, run_step

log = logging.getLogger(__name__)


class Answer(StrEnum):
    """The gate's decision, as a pipeline parameter holds it."""

    yes = "true"
    no = "false"


def main(
    student: Annotated[Path, typer.Option(help="Folder of the student, in Hugging Face layout.")],
    scores: Annotated[str, typer.Option(help="Scores of the student: JSON of step `evaluate`.")],
    promote: Annotated[
        Answer, typer.Option(help="Whether it becomes the champion: output of step `gate`.", case_sensitive=False)
    ],
    reason: Annotated[str, typer.Option(help="The gate's reason.")] = "",
    specdec_after: Annotated[str, typer.Option(help="The student as draft: JSON of step `specdec_benchmark`.")] = "",
    comet: Annotated[str, typer.Option(help="COMET's scores of all models: JSON of step `comet_score`.")] = "",
    registry_config: Annotated[str, typer.Option(help="Section `registry` of the run's config, as JSON.")] = "{}",
    teacher: Annotated[str, typer.Option(help="Lineage: the teacher; the student's metadata knows it as a rule.")] = "",
    base_student: Annotated[str, typer.Option(help="Lineage: what the student started from.")] = "",
    data_fingerprint: Annotated[str, typer.Option(help="Lineage: fingerprint of the data.")] = "",
    method: Annotated[str, typer.Option(help="Lineage: how the student was distilled.")] = "",
    tracking_uri: Annotated[str, typer.Option(help="MLflow tracking URI; empty: no tracking.")] = "",
    experiment: Annotated[str, typer.Option(help="MLflow experiment.")] = "skd",
    executor_input: Annotated[str | None, typer.Option(help=EXECUTOR_INPUT_HELP)] = None,
) -> None:
    """Register the student by URI and digest of its weights: the same weights are registered once.

    It gets the alias `challenger`, and `champion` where the gate said so. Lineage comes from the metadata that
    earlier steps left on the student, and from the options. A registry that does not answer is waited for, for
    `SKD_REGISTRY_WAIT` seconds. Output parameter `version`; empty without tracking.
    """
    from skd_lib import __version__
    from skd_lib.report.summary import Comet, Scores, Specdec
    from skd_lib.tracking import registry
    from skd_lib.tracking.runs import step_run

    settings = parse_section(RegistryConfig, registry_config, where="--registry-config")
    figures = parse_section(Scores, scores, where="--scores").figures()
    figures |= parse_section(Comet, comet or "{}", where="--comet").figures("student_after")
    if specdec_after:
        figures |= parse_section(Specdec, specdec_after, where="--specdec-after").figures()
    if not student.is_dir():
        raise SkdError("there is no such folder", where=f"--student {student}", hint="give the folder of the student")
    io = StepIO(executor_input, {})
    known = {
        name: str(value) for name, value in io.input_metadata("student").items() if isinstance(value, str | int | float)
    }
    digest = known.pop("weights_sha256", "") or weights_digest(student)
    given = {"teacher": teacher, "base_student": base_student, "method": method}
    lineage = {
        # What made the student knows better; this is for one that came from elsewhere.
        "code_version": os.environ.get("SKD_CODE_VERSION") or f"skd-lib {__version__}",
        **known,
        **{name: value for name, value in given.items() if value},
        registry.FINGERPRINT_TAG: data_fingerprint or known.get(registry.FINGERPRINT_TAG, ""),
        registry.PIPELINE_RUN_TAG: os.environ.get("KFP_RUN_ID", ""),
        "gate": reason,
    }
    uri = io.input_uri("student", student)
    uri = uri if "://" in uri else str(Path(uri).resolve())

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
                run_id=run.parent.find,
                promote=promote is Answer.yes,
                figures=figures,
                tags=lineage,
                description=_description(lineage, figures),
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


def _description(lineage: dict[str, str], figures: dict[str, float]) -> str:
    teacher = lineage.get("teacher") or "its teacher"
    method = lineage.get("method") or "distillation"
    shown = ", ".join(f"{name} {value:.4g}" for name, value in figures.items())
    return f"Student of {teacher} by {method}. {shown}. {lineage['gate']}".strip()


if __name__ == "__main__":
    run_step(main)
