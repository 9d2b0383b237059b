"""Step `student_init`: make the student that distillation starts from."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer

from skd_lib.config import StudentInitConfig, parse_section
from skd_lib.config.step import STEP_HELP, StepConfig
from skd_lib.errors import SkdError, SkdErrors
from skd_lib.steps import trained_model
from skd_lib.steps.runtime import CheckpointRoot, Experiment, StepIO, TrackingUri, present, run_step, step_name
from skd_lib.steps.training_run import DATA_HELP, fine_tune
from skd_lib.storage import check_checkpoint_root


def main(
    teacher: Annotated[Path, typer.Option(help="Folder of the fine-tuned teacher, in Hugging Face layout.")],
    data: Annotated[Path, typer.Option(help=f"{DATA_HELP} Fine-tuning uses train_student and validation.")],
    student_out: Annotated[Path, typer.Option(help="Folder for the student.")],
    config: Annotated[
        str, typer.Option(help=f"{STEP_HELP}: `student`, `fingerprint`, `student_init`, `task`, `seed`, `label`.")
    ] = "{}",
    checkpoint_root: CheckpointRoot = "",
    tracking_uri: TrackingUri = "",
    experiment: Experiment = "skd",
) -> None:
    """Make the student: a model of its own or cut from the teacher, as it is or fine-tuned on its own examples.

    - `as_is`: the student that `student` names (hub id, local folder, gs:// or wheel:// reference), unchanged.
    - `sft`: the same, fine-tuned on the student's training examples.
    - `prune`: the teacher without a contiguous block of middle layers.
    - `prune_sft`: the same, fine-tuned on the student's training examples.

    The model's record (`skd_lib.models.records`) holds its lineage and the closing figures.
    """
    own = parse_section(StepConfig, config, where="--config")
    settings, student = own.student_init, own.student
    check_checkpoint_root(checkpoint_root)
    place = "--config, field `student`"
    if settings.cuts and student:
        raise SkdError(f"mode `{settings.mode}` cuts the student from the teacher", where=place, hint="leave it out")
    if not settings.cuts and not student:
        raise SkdError(f"mode `{settings.mode}` needs a student", where=place, hint="name a model")
    present("teacher", teacher)
    present("data", data)
    io = StepIO({"initial_student": student_out})

    from skd_lib.models.files import check_model_folder, weights_digest
    from skd_lib.models.importing import fetch_model, import_folder
    from skd_lib.models.records import read_record, write_record
    from skd_lib.models.references import LocalFolder, check_unchanged, parse_reference
    from skd_lib.models.vocabulary import check_compatible
    from skd_lib.tracking.runs import step_run

    check_model_folder(teacher)
    taught = read_record(teacher).lineage
    teacher_reference = str(taught.get("reference") or io.input_uri("teacher", teacher))
    base = student
    if settings.cuts:
        base = f"{teacher_reference}, first {settings.keep_first} and last {settings.keep_last} layers"
    lineage: dict[str, Any] = {
        "reference": base,
        "base_student": base,
        "student_init": settings.mode,
        "teacher": teacher_reference,
        "teacher_weights_sha256": weights_digest(teacher),
    }
    if teacher_fingerprint := taught.get("fingerprint"):
        lineage["teacher_fingerprint"] = teacher_fingerprint
    params = {"seed": own.seed, "student": base, "student_init": settings.model_dump(mode="json", exclude_none=True)}
    figures: dict[str, float] = {"steps": 0}
    name = step_name("student_init", own.label)
    with step_run(
        step=name, tracking_uri=tracking_uri, experiment=experiment, params=params, checkpoint_root=checkpoint_root
    ) as run:
        with ExitStack() as scratch:
            if settings.cuts:
                folder = student_out
                if settings.trains:
                    folder = Path(scratch.enter_context(TemporaryDirectory())) / "cut"
                digest = _cut(teacher, folder, settings, base)
                figures["layers"] = (settings.keep_first or 0) + (settings.keep_last or 0)
            else:
                folder, fingerprint = fetch_model(student, own.fingerprint)
                lineage["base_student_fingerprint"] = fingerprint
                if problems := check_compatible(teacher, folder):
                    raise SkdErrors(problems)
                digest = weights_digest(folder)
            lineage["weights_sha256"] = digest
            if settings.trains:
                tuned = fine_tune(
                    "student_init",
                    own,
                    folder,
                    digest,
                    student_out,
                    checkpoint_root=checkpoint_root,
                    base=base,
                    title=f"Student, {'cut from its teacher and ' * settings.cuts}fine-tuned on the task",
                    data=data,
                    data_uri=io.input_uri("data", data),
                    run=run,
                    loaded=lambda: None if settings.cuts else check_unchanged(student, fingerprint),
                )
                if tuned is None:
                    return
                facts, trained, checkpoints = tuned
                lineage |= facts
                figures |= trained
            elif not settings.cuts:
                # A user's own folder may be written to again; caches never change what they hold.
                import_folder(folder, student_out, link=not isinstance(parse_reference(student), LocalFolder))
                check_unchanged(student, fingerprint)  # nor while it was copied
        lineage |= trained_model.run_facts(run)
        write_record(student_out, lineage=lineage, figures=figures)
        trained_model.log_outcome(run, figures, lineage, io.output_uri("initial_student"))

    io.write()
    if settings.trains:
        checkpoints.remove()


def _cut(teacher: Path, folder: Path, settings: StudentInitConfig, base: str) -> str:
    """Save the layers of the teacher that are kept; returns the digest of the weights."""
    from skd_lib.models.card import Lineage, model_card
    from skd_lib.models.files import load_tokenizer
    from skd_lib.models.loading import default_device
    from skd_lib.models.precision import resolve_precision
    from skd_lib.models.student_init import prune_layers

    assert settings.keep_first is not None and settings.keep_last is not None  # noqa: S101, PT018 - validated
    precision = resolve_precision(settings.training.precision, default_device())
    whole = trained_model.load_frozen(teacher, computing=precision)
    cut = prune_layers(whole, settings.keep_first, settings.keep_last)
    lineage = Lineage(base=base, method="prune", code_version=trained_model.code_version())
    return trained_model.save_trained(
        cut, load_tokenizer(teacher), folder, model_card("Student, cut from its teacher", lineage), precision
    )


if __name__ == "__main__":
    run_step(main)
