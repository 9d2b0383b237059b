"""Step `distill`: train the student under the teacher."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from skd_lib.config import DistillConfig, TaskConfig, parse_section
from skd_lib.errors import SkdErrors
from skd_lib.machine import peak_memory
from skd_lib.steps import fitting
from skd_lib.steps.runtime import EXECUTOR_INPUT_HELP, StepIO, run_step
from skd_lib.storage import checkpoint_folder, write_text_atomic

if TYPE_CHECKING:
    from skd_lib.training.run import TrainResult


def main(
    student: Annotated[Path, typer.Option(help="Folder of the student as `student_init` made it.")],
    teacher: Annotated[Path, typer.Option(help="Folder of the fine-tuned teacher; must have the student's tokenizer.")],
    data: Annotated[Path, typer.Option(help=f"{fitting.DATA_HELP} Its train_student and validation splits are used.")],
    checkpoint_root: Annotated[str, typer.Option(help=fitting.CHECKPOINT_HELP)],
    student_out: Annotated[Path, typer.Option(help="Folder for the distilled student.")],
    metrics_out: Annotated[Path, typer.Option(help=fitting.METRICS_HELP)],
    samples_out: Annotated[
        Path, typer.Option(help="Where a few training sequences go: JSONL, see `skd_lib.report.samples`.")
    ],
    config: Annotated[
        str,
        typer.Option(
            help="Section `distill` of the run's config, as JSON: method (sft, supervised_kd, on_policy, skd), "
            "divergence (forward_kl, reverse_kl, jsd), sampling (top_k, gamma, student, teacher), training."
        ),
    ] = "{}",
    task_config: Annotated[str, typer.Option(help=fitting.TASK_HELP)] = "{}",
    seed: Annotated[int, typer.Option(min=0, help=fitting.SEED_HELP)] = 0,
    tracking_uri: Annotated[str, typer.Option(help=fitting.TRACKING_URI_HELP)] = "",
    experiment: Annotated[str, typer.Option(help=fitting.EXPERIMENT_HELP)] = "skd",
    executor_input: Annotated[str | None, typer.Option(help=EXECUTOR_INPUT_HELP)] = None,
) -> None:
    """Train the student under the teacher, and keep the weights of the lowest validation loss.

    Methods: `skd` (Speculative Knowledge Distillation: the student drafts, the teacher replaces what is not among
    its top K), `on_policy` (the student's own samples), `supervised_kd` (ground truth), `sft` (ground truth, without
    the teacher). A run that was killed goes on from its last checkpoint when it is started again.

    Output parameter `course`: losses, rejection rate and lengths by step, and where the time went.
    """
    settings = parse_section(DistillConfig, config, where="--config")
    task = parse_section(TaskConfig, task_config, where="--task-config")
    root = checkpoint_folder(checkpoint_root)
    io = StepIO(executor_input, {"distilled_student": student_out, "metrics": metrics_out, "samples": samples_out})

    from skd_lib.data.prepared import PreparedData
    from skd_lib.models.card import Lineage, model_card
    from skd_lib.models.loading import check_model_folder, load_tokenizer
    from skd_lib.models.vocabulary import check_compatible
    from skd_lib.report.samples import as_text, to_jsonl
    from skd_lib.tracking.runs import step_run

    for folder in (student, teacher):
        check_model_folder(folder)
    if problems := check_compatible(teacher, student):
        raise SkdErrors(problems)
    known = io.input_metadata("student")
    base = str(known.get("base_student") or io.input_uri("student", student))
    teacher_reference = str(io.input_metadata("teacher").get("reference") or io.input_uri("teacher", teacher))
    weights = {
        "student": fitting.input_digest(io, "student", student),
        "teacher": fitting.input_digest(io, "teacher", teacher),
    }
    metadata: dict[str, Any] = {
        **known,
        "base_student": base,
        "initial_weights_sha256": weights["student"],
        "teacher": teacher_reference,
        "teacher_weights_sha256": weights["teacher"],
        "method": settings.method,
        **_sampling_and_loss(settings),
        "code_version": fitting.code_version(),
    }
    params = {"seed": seed, "student": base, "teacher": teacher_reference, "distill": settings.model_dump(mode="json")}
    with step_run(step="distill", tracking_uri=tracking_uri, experiment=experiment, params=params) as run:
        prepared = PreparedData.load(data)
        fit = fitting.Fit(
            step="distill",
            method=settings.method,
            split="train_student",
            training=settings.training,
            distill=settings,
            task=task,
            seed=seed,
            checkpoint_root=root,
            weights=weights,
        )
        model, tokenizer = fitting.load_trainable(student), load_tokenizer(student)
        guide = None if settings.method == "sft" else fitting.load_frozen(teacher)
        result, figures = fit.run(model, guide, tokenizer, prepared, io.input_uri("data", data), run)
        if not fitting.is_main_process():
            return
        lineage = Lineage(
            base=base,
            method=settings.method,
            teacher=teacher_reference,
            data_fingerprint=prepared.fingerprint,
            code_version=fitting.code_version(),
            settings={**_sampling_and_loss(settings), **fitting.training_facts(settings.training, result)},
        )
        losses = {"best validation loss": result.best_validation_loss}
        card = model_card("Distilled student", lineage, losses)
        metadata["weights_sha256"] = fitting.save_trained(model, tokenizer, student_out, card)
        metadata["data_fingerprint"] = prepared.fingerprint
        fitting.write_figures(metrics_out, io, figures, run)
        write_text_atomic(samples_out, to_jsonl(as_text(trace, tokenizer) for trace in result.traces))
        run.set_tags({"model_uri": io.output_uri("distilled_student"), **metadata})

    io.metadata("distilled_student", **metadata)
    # The report reads the lineage here: its input is a small file then, and no model that has to be fetched.
    io.metadata("samples", sequences=len(result.traces), **metadata)
    io.parameter("course", _course(result, settings.training.batch_size))
    io.write()
    fit.remove_checkpoints(prepared)


def _sampling_and_loss(settings: DistillConfig) -> dict[str, Any]:
    """The settings that the method reads, for somebody who finds the model in a registry."""
    if settings.method == "sft":
        return {}
    facts: dict[str, Any] = {"divergence": settings.divergence}
    if settings.divergence == "jsd":
        facts["beta"] = settings.beta
    if settings.method == "skd":
        facts |= {"top_k": settings.sampling.top_k, "gamma": settings.sampling.gamma}
    if settings.method == "on_policy":
        facts["on_policy_fraction"] = settings.on_policy_fraction
    return facts


def _course(result: TrainResult, batch_size: int) -> dict[str, Any]:
    """The curves that the report draws, and the time and memory that the training took."""
    from skd_lib.report.curves import thinned
    from skd_lib.training.timing import SECONDS

    course: dict[str, Any] = {
        "seconds": {name.removeprefix(SECONDS): value for name, value in result.seconds.items()},
        "peak_bytes": {"process": peak_memory(), **result.peak_bytes},
    }
    for steps, figures in {
        "steps": {"rejection_rate": "rejection_rate", "tokens_per_teacher_call": "tokens_per_teacher_call"},
        "training_steps": {"loss": "training_loss", "response_tokens": "response_length"},
        "validation_steps": {"validation_loss": "validation_loss"},
    }.items():
        for figure, name in figures.items():
            entries = [entry for entry in result.history if figure in entry]
            scale = batch_size if name == "response_length" else 1
            course[steps], course[name] = thinned(
                [int(entry["step"]) for entry in entries], [entry[figure] / scale for entry in entries]
            )
    return course


if __name__ == "__main__":
    run_step(main)
