"""Step `teacher_sft`: fine-tune the teacher on the task."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from skd_lib.config import TaskConfig, TeacherSftConfig, parse_section
from skd_lib.steps import fitting
from skd_lib.steps.runtime import EXECUTOR_INPUT_HELP, StepIO, run_step
from skd_lib.storage import check_checkpoint_root


def main(
    teacher: Annotated[Path, typer.Option(help="Folder of the teacher, in Hugging Face layout.")],
    data: Annotated[Path, typer.Option(help=f"{fitting.DATA_HELP} Its train_teacher and validation splits are used.")],
    checkpoint_root: Annotated[str, typer.Option(help=fitting.CHECKPOINT_HELP)],
    teacher_out: Annotated[Path, typer.Option(help="Folder for the fine-tuned teacher.")],
    metrics_out: Annotated[Path, typer.Option(help=fitting.METRICS_HELP)],
    config: Annotated[str, typer.Option(help="Section `teacher_sft` of the run's config, as JSON.")] = "{}",
    task_config: Annotated[str, typer.Option(help=fitting.TASK_HELP)] = "{}",
    seed: Annotated[int, typer.Option(min=0, help=fitting.SEED_HELP)] = 0,
    tracking_uri: Annotated[str, typer.Option(help=fitting.TRACKING_URI_HELP)] = "",
    experiment: Annotated[str, typer.Option(help=fitting.EXPERIMENT_HELP)] = "skd",
    executor_input: Annotated[str | None, typer.Option(help=EXECUTOR_INPUT_HELP)] = None,
) -> None:
    """Fine-tune the teacher on the task's training examples, and keep the weights of the lowest validation loss.

    With `enabled: false` in its section the teacher is passed on as it is. With `multinode` the training is done by a
    TrainJob of Kubeflow Trainer.
    """
    settings = parse_section(TeacherSftConfig, config, where="--config")
    task = parse_section(TaskConfig, task_config, where="--task-config")
    check_checkpoint_root(checkpoint_root)
    io = StepIO(executor_input, {"tuned_teacher": teacher_out, "metrics": metrics_out})
    if settings.enabled and settings.multinode is not None:
        from skd_lib.multinode.coordinate import Work, train_on_nodes

        work = Work(
            step="teacher_sft",
            options={
                "checkpoint_root": checkpoint_root,
                "config": settings.model_dump_json(exclude={"multinode"}),
                "task_config": task.model_dump_json(),
                "seed": str(seed),
                "tracking_uri": tracking_uri,
                "experiment": experiment,
            },
            inputs={"teacher": teacher, "data": data},
            outputs={"teacher_out": "tuned_teacher", "metrics_out": "metrics"},
            executor_input=executor_input,
        )
        train_on_nodes(work, settings.multinode, io)
        return

    from skd_lib.models.files import check_model_folder
    from skd_lib.steps.import_model import import_folder
    from skd_lib.tracking.runs import step_run

    check_model_folder(teacher)
    known = io.input_metadata("teacher")
    reference = str(known.get("reference") or io.input_uri("teacher", teacher))
    digest = fitting.input_digest(io, "teacher", teacher)
    params = {"seed": seed, "teacher": reference, "teacher_sft": settings.model_dump(mode="json")}
    with step_run(
        step="teacher_sft",
        tracking_uri=tracking_uri,
        experiment=experiment,
        params=params,
        checkpoint_root=checkpoint_root,
    ) as run:
        if not settings.enabled:
            import_folder(teacher, teacher_out, link=True)
            metadata = {**known, "weights_sha256": digest, "reference": reference}
            fitting.write_figures(metrics_out, io, {"steps": 0}, run)
        else:
            from skd_lib.data.prepared import PreparedData

            prepared = PreparedData.load(data)
            fit = fitting.Fit(
                step="teacher_sft",
                method="sft",
                split="train_teacher",
                training=settings.training,
                distill=None,
                task=task,
                seed=seed,
                checkpoint_root=checkpoint_root,
                models={"teacher": teacher},
                weights={"teacher": digest},
            )
            tuned = fitting.fine_tune(
                fit,
                teacher_out,
                base=reference,
                title="Teacher, fine-tuned on the task",
                data=prepared,
                data_uri=io.input_uri("data", data),
                run=run,
            )
            if tuned is None:
                return
            facts, figures, checkpoints = tuned
            metadata = {**known, "reference": reference, "method": "sft", **facts}
            io.metadata("tuned_teacher", long_prompts=int(figures[f"{fitting.LEFT_OUT}train_teacher"]))
            fitting.write_figures(metrics_out, io, figures, run)
        run.set_tags({"model_uri": io.output_uri("tuned_teacher"), **metadata})

    io.metadata("tuned_teacher", **metadata)
    io.write()
    if settings.enabled:
        checkpoints.remove()


if __name__ == "__main__":
    run_step(main)
