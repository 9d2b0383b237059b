"""Step `distill`: train the student under the teacher."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from skd_lib._core.machine import is_main_process, peak_memory
from skd_lib.config import DistillConfig, Schedule, parse_section
from skd_lib.config.step import STEP_HELP, StepConfig
from skd_lib.distillation.divergences import DIVERGENCES
from skd_lib.distillation.methods import METHODS
from skd_lib.errors import SkdError, SkdErrors
from skd_lib.sampling.acceptance import RULES
from skd_lib.steps import trained_model
from skd_lib.steps.runtime import CheckpointRoot, Experiment, StepIO, TrackingUri, present, run_step, step_name
from skd_lib.steps.training_run import DATA_HELP, LEFT_OUT, TrainingRun
from skd_lib.storage import check_checkpoint_root

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from skd_lib.data.prepared import PreparedData


def main(
    student: Annotated[Path, typer.Option(help="Folder of the student as `student_init` made it.")],
    teacher: Annotated[Path, typer.Option(help="Folder of the fine-tuned teacher; must have the student's tokenizer.")],
    data: Annotated[Path, typer.Option(help=f"{DATA_HELP} Its train_student and validation splits are used.")],
    student_out: Annotated[Path, typer.Option(help="Folder for the distilled student.")],
    config: Annotated[
        str, typer.Option(help=f"{STEP_HELP}: `distill`, `task`, `seed`, `label`. `skd config` lists their fields.")
    ] = "{}",
    checkpoint_root: CheckpointRoot = "",
    tracking_uri: TrackingUri = "",
    experiment: Experiment = "skd",
) -> None:
    """Train the student under the teacher, and keep the weights of the lowest validation loss.

    The method in the config decides who writes the responses, and the loss; `skd config` describes all methods. A run
    that was killed goes on from its last checkpoint when it is started again. With `multinode` in the config the
    training is done by a TrainJob of Kubeflow Trainer.

    The model's record (`skd_lib.models.records`) holds its lineage, the closing figures, curves of losses, rejection
    rate and lengths, and a few training sequences.
    """
    own = parse_section(StepConfig, config, where="--config")
    settings = own.distill
    check_checkpoint_root(checkpoint_root)
    present("student", student)
    present("teacher", teacher)
    present("data", data)
    io = StepIO({"distilled_student": student_out})
    if settings.multinode is not None:
        from skd_lib.multinode.coordinate import Work, train_on_nodes

        work = Work(
            step="distill",
            options={
                "checkpoint_root": checkpoint_root,
                "config": own.model_dump_json(exclude={"distill": {"multinode"}}),
                "tracking_uri": tracking_uri,
                "experiment": experiment,
            },
            inputs={"student": student, "teacher": teacher, "data": data},
            outputs={"student_out": "distilled_student"},
        )
        train_on_nodes(work, settings.multinode, io)
        return

    from skd_lib.data.prepared import PreparedData
    from skd_lib.evaluation.generate import ending_ids
    from skd_lib.models.card import Lineage, model_card
    from skd_lib.models.files import check_model_folder, load_tokenizer, served_in, weights_digest
    from skd_lib.models.records import as_text, read_record, to_jsonl, write_record
    from skd_lib.models.vocabulary import check_compatible, take_over_ends
    from skd_lib.report.course import curves
    from skd_lib.served.teacher import RemoteTeacher
    from skd_lib.tracking.runs import step_run
    from skd_lib.training.figures import SECONDS

    for folder in (student, teacher):
        check_model_folder(folder)
    served = served_in(teacher)
    if served and (lacking := settings.needs_of_weights()):
        raise SkdErrors([SkdError(each, where="--config, teacher on a server") for each in lacking])
    if problems := check_compatible(teacher, student):
        raise SkdErrors(problems)
    known, taught = read_record(student).lineage, read_record(teacher).lineage
    base = str(known.get("base_student") or io.input_uri("student", student))
    teacher_reference = str(taught.get("reference") or io.input_uri("teacher", teacher))
    weights = {"student": weights_digest(student), "teacher": weights_digest(teacher)}
    origin: dict[str, Any] = {
        **known,
        "base_student": base,
        "initial_weights_sha256": weights["student"],
        "teacher": teacher_reference,
        "teacher_weights_sha256": weights["teacher"],
        "method": settings.method,
        **_sampling_and_loss(settings),
    }
    params = {
        "seed": own.seed,
        "student": base,
        "teacher": teacher_reference,
        "distill": settings.model_dump(mode="json"),
    }
    name = step_name("distill", own.label)
    with step_run(
        step=name, tracking_uri=tracking_uri, experiment=experiment, params=params, checkpoint_root=checkpoint_root
    ) as run:
        prepared = PreparedData.load(data)
        training_run = TrainingRun(
            step="distill",
            method=settings.method,
            split="train_student",
            training=settings.training,
            distill=settings,
            task=own.task,
            seed=own.seed,
            checkpoint_root=checkpoint_root,
            models={"student": student, "teacher": teacher},
            weights=weights,
        )
        model, tokenizer = trained_model.load_trainable(student), load_tokenizer(student)
        take_over_ends(model, tokenizer, teacher)
        load_teacher: Callable[[], PreTrainedModel] | RemoteTeacher | None = None
        if served and METHODS[settings.method].needs_teacher:
            ends = ending_ids(model, tokenizer, own.task)
            load_teacher = RemoteTeacher(served, tokenizer, own.task, ends, private=prepared.private)
        elif METHODS[settings.method].needs_teacher:
            precisions = settings.training.teacher_precision, settings.training.precision
            load_teacher = partial(trained_model.load_frozen, teacher, precisions[0], computing=precisions[1])
        result, figures, checkpoints = training_run.run(
            model, load_teacher, tokenizer, prepared, io.input_uri("data", data), run
        )
        if not is_main_process():
            return
        if isinstance(load_teacher, RemoteTeacher):
            figures |= load_teacher.costs()
        lineage = Lineage(
            base=base,
            method=settings.method,
            teacher=teacher_reference,
            teacher_tuned=taught.get("method") == "sft",
            data_fingerprint=prepared.fingerprint,
            code_version=trained_model.code_version(),
            settings={**_sampling_and_loss(settings), **trained_model.training_facts(settings.training, result)},
        )
        losses = {"best validation loss": result.best_validation_loss}
        card = model_card("Distilled student", lineage, losses)
        digest = trained_model.save_trained(result.student, tokenizer, student_out, card, result.precision)
        origin |= {"weights_sha256": digest, "precision": result.precision, "data_fingerprint": prepared.fingerprint}
        origin |= trained_model.run_facts(run)
        trained_model.log_outcome(run, figures, origin, io.output_uri("distilled_student"))
        long = {"train_teacher": taught.get("long_prompts")}
        long |= {name: figures[f"{LEFT_OUT}{name}"] for name in ("train_student", "validation")}
        write_record(
            student_out,
            lineage={**origin, "losses": _losses(prepared, long)},
            course={
                "seconds": {name.removeprefix(SECONDS): value for name, value in result.seconds.items()},
                "peak_bytes": {"process": peak_memory(), **result.peak_bytes},
                **curves(result.history, settings.training.batch_size),
            },
            figures=figures,
            samples="" if prepared.private else to_jsonl(as_text(trace, tokenizer) for trace in result.traces),
        )

    io.write()
    checkpoints.remove()
    if isinstance(load_teacher, RemoteTeacher):
        load_teacher.forget()


def _losses(data: PreparedData, long: Mapping[str, float | None]) -> dict[str, Any]:
    """Return the examples that each split lost in preparation, and to long prompts in training."""
    from skd_lib.data.splits import with_long_prompts

    losses: dict[str, Any] = data.manifest.get("losses", {})
    for name, count in long.items():
        if count is not None:
            losses = with_long_prompts(losses, name, data.manifest["rows"][name], int(count))
    return losses


def _sampling_and_loss(settings: DistillConfig) -> dict[str, Any]:
    """Return the settings that the method reads, for the model's card and its registered version."""
    method, sampling = METHODS[settings.method], settings.sampling
    facts: dict[str, Any] = {}
    if method.uses_divergence:
        facts["divergence"] = settings.divergence
        facts |= {name: getattr(settings, name) for name in DIVERGENCES[settings.divergence].settings}
    if method.needs_teacher and settings.teacher_signal.mode == "stored":
        facts["teacher_signal"] = f"stored, top {settings.teacher_signal.top_k}" if method.uses_divergence else "stored"
    if method.interleaves:
        facts["rule"] = sampling.rule
        facts |= {name: _plain(getattr(sampling, name)) for name in RULES[sampling.rule].settings}
        facts["gamma"] = _plain(sampling.gamma)
        if settings.replaced_weight:
            facts["replaced_weight"] = settings.replaced_weight
    return facts | {name: _plain(getattr(settings, name)) for name in method.settings}


def _plain(setting: Any) -> Any:
    """Return a number unchanged, a schedule in words."""
    return str(setting) if isinstance(setting, Schedule) else setting


if __name__ == "__main__":
    run_step(main)
