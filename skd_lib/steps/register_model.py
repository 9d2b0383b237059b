"""Step `register_model`: the student in MLflow's registry, with its lineage, and as the champion if it is better."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from skd_lib._core.events import outcome
from skd_lib.config import LOWER_IS_BETTER, parse_section
from skd_lib.models.files import weights_digest
from skd_lib.steps.runtime import Experiment, StepIO, TrackingUri, present, run_step

if TYPE_CHECKING:
    from skd_lib.report.measured import Measured
    from skd_lib.tracking.gate import Decision

log = logging.getLogger(__name__)
LINEAGE = (
    *("teacher", "teacher_fingerprint", "teacher_weights_sha256"),
    *("base_student", "base_student_fingerprint", "initial_weights_sha256", "student_init"),
    *("method", "divergence", "beta", "alpha", "teacher_signal"),
    *("rule", "top_k", "min_prob", "mixture", "gamma", "replaced_weight", "on_policy_fraction", "sampled_fraction"),
    *("precision", "data_fingerprint", "code_version", "pipeline_run_id"),
)
"""Fields of a student's record that become tags of its version; others stay in its folder."""


def main(
    student: Annotated[Path, typer.Option(help="Folder of the student, in Hugging Face layout.")],
    measured: Annotated[
        str, typer.Option(help="The student and the champion as this run has measured them: JSON of step `report`.")
    ],
    tracking_uri: TrackingUri = "",
    experiment: Experiment = "skd",
) -> None:
    """Register the student by URI and digest of its weights, and decide whether it becomes the champion.

    The same weights are registered once. The student gets the alias `challenger`, and `champion` where there is none,
    or where it beats the one that this run measured (`skd_lib.tracking.gate`). Its lineage comes from the record that
    its training left in its folder, and names the run that trained it. Small files beside the weights let
    `mlflow.transformers.load_model` and `mlflow.pyfunc.load_model` load it. A registry that does not answer is waited
    for, for `SKD_REGISTRY_WAIT` seconds; without tracking there is none, and nothing is registered.
    """
    from skd_lib.models.records import read_record
    from skd_lib.report.measured import Measured
    from skd_lib.tracking import registry
    from skd_lib.tracking.mlmodel import write_beside
    from skd_lib.tracking.runs import step_run

    found = parse_section(Measured, measured, where="--measured")
    settings, figures = found.registry, {**found.student, **found.draft}
    io = StepIO({})
    record = read_record(present("student", student))
    digest = weights_digest(student)
    uri = io.input_uri("student", student)

    params = {"registry": settings.model_dump()}
    with step_run(step="register_model", tracking_uri=tracking_uri, experiment=experiment, params=params) as run:
        decision = _decide(found, digest, tracking_uri)
        # It may quote tokens of a vocabulary, half a surrogate pair among them, which no database takes.
        reason = decision.reason.encode("utf-8", "backslashreplace").decode()
        run.set_tags({"promote": decision.promote, "reason": reason})
        run.log_metrics(found.student)
        verdict = f"{'promoted' if decision.promote else 'not promoted'}: {reason}"
        if tracking_uri:
            tags = {
                **version_tags(record.lineage),
                **{f"{registry.SIGNATURE_PREFIX}{name}": text for name, text in found.signatures.items()},
                registry.GATE_TAG: reason,
                registry.SERVED_TAG: found.served,
                registry.DRAFTED_TAG: found.drafted,
            }
            example = next((sample.prompt for sample in record.samples()), "")
            write_beside(student, uri, example)
            version = registry.register(
                tracking_uri=tracking_uri,
                model_name=settings.model_name,
                student_uri=uri,
                weights_sha256=digest,
                trained_by=record.mlflow_run_id,
                run_id=run.parent.find,
                promote=decision.promote,
                figures=figures,
                tags=tags,
                description=_description(tags, figures, reason),
                example=example,
                patience=registry.step_patience(),
            )
            result = {
                "registered_model": f"{settings.model_name}/{version}",
                "champion": "true" if decision.promote else "false",
                "student_uri": uri,
                "student_weights_sha256": digest,
            }
            run.set_tags(result)
            run.parent.set_tags(result)
            aliases = "challenger and champion" if decision.promote else "challenger"
            outcome(f"registered as {settings.model_name} version {version} ({aliases}); {verdict}")
        else:
            outcome(f"not registered; {verdict}")
            log.warning("tracking is off: the student stays unregistered at %s", uri)

    io.write()


def _decide(found: Measured, digest: str, tracking_uri: str) -> Decision:
    """Compare the student with the registered champion: by the task's metric (if that is the gate), and as drafts.

    If the champion has the student's weights by now, an earlier attempt of this step has promoted them, and this one
    decides alike. Without `tracking_uri` there is no registry.
    """
    from skd_lib.tracking import registry
    from skd_lib.tracking.gate import Decision, decide, decide_drafts

    settings, metric = found.registry, found.task_metric
    by_score = settings.gate == "score"
    if by_score and metric == "comet" and found.comet_missing:
        return Decision(False, "the score that decides, COMET, is missing; the report says why")
    if not tracking_uri:
        return Decision(False, "tracking is off, so there is no registry to promote in")
    if by_score and metric not in found.student and metric != "comet":
        return Decision(False, f"there is no score `{metric}` to decide by; the report says why")
    now = registry.champion(
        tracking_uri=tracking_uri, model_name=settings.model_name, patience=registry.step_patience()
    )
    if now is not None and now.version != found.champion.version and now.weights_sha256 != digest:
        why = f"version {now.version} is the champion now, and was not when this run measured"
        return Decision(False, f"{why}; start the run again to compare with it")
    margins = settings.model_dump(include={"min_improvement", "max_slowdown"})
    if not by_score:
        return decide_drafts(found.champion, found.draft.get("tokens_per_teacher_call"), **margins)
    better = metric not in LOWER_IS_BETTER
    return decide(found.student, found.champion, metric, higher_is_better=better, before=found.before, **margins)


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
