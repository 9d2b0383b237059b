"""Step `teacher_sft`: fine-tune the teacher on the task."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from skd_lib.config import TaskConfig, TeacherSftConfig, parse_section
from skd_lib.steps import fitting
from skd_lib.steps.inputs import present
from skd_lib.steps.options import CheckpointRoot, Experiment, TrackingUri
from skd_lib.steps.runtime import StepIO, run_step
from skd_lib.storage import check_checkpoint_root


def main(
    teacher: Annotated[Path, typer.Option(help="Folder of the teacher, in Hugging Face layout.")],
    data: Annotated[Path, typer.Option(help=f"{fitting.DATA_HELP} Its train_teacher and validation splits are used.")],
    teacher_out: Annotated[Path, typer.Option(help="Folder for the fine-tuned teacher.")],
    config: Annotated[str, typer.Option(help="Section `teacher_sft` of the run's config, as JSON.")] = "{}",
    task_config: Annotated[str, typer.Option(help=fitting.TASK_HELP)] = "{}",
    seed: Annotated[int, typer.Option(min=0, help=fitting.SEED_HELP)] = 0,
    checkpoint_root: CheckpointRoot = "",
    tracking_uri: TrackingUri = "",
    experiment: Experiment = "skd",
) -> None:
    """Fine-tune the teacher on the task's training examples, and keep the weights of the lowest validation loss.

    With `enabled: false` in its section the teacher is passed on as it is. With `multinode` the training is done by a
    TrainJob of Kubeflow Trainer. The same work, started again, goes on from its last checkpoint under
    `--checkpoint-root`. The model's record (`skd_lib.records`) holds its lineage and the closing figures.
    """
    settings = parse_section(TeacherSftConfig, config, where="--config")
    task = parse_section(TaskConfig, task_config, where="--task-config")
    check_checkpoint_root(checkpoint_root)
    present("teacher", teacher)
    present("data", data)
    io = StepIO({"tuned_teacher": teacher_out})
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
            outputs={"teacher_out": "tuned_teacher"},
        )
        train_on_nodes(work, settings.multinode, io)
        return

    from skd_lib.models.files import check_model_folder, weights_digest
    from skd_lib.records import read_record, write_record
    from skd_lib.steps.import_model import import_folder
    from skd_lib.tracking.runs import step_run

    check_model_folder(teacher)
    known = read_record(teacher).lineage
    reference = str(known.get("reference") or io.input_uri("teacher", teacher))
    digest = weights_digest(teacher)
    params = {"seed": seed, "teacher": reference, "teacher_sft": settings.model_dump(mode="json")}
    with step_run(
        step="teacher_sft",
        tracking_uri=tracking_uri,
        experiment=experiment,
        params=params,
        checkpoint_root=checkpoint_root,
    ) as run:
        lineage = {**known, "reference": reference}
        figures: dict[str, float] = {"steps": 0}
        if not settings.enabled:
            import_folder(teacher, teacher_out, link=True)
            lineage |= {"weights_sha256": digest}
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
            long = int(figures[f"{fitting.LEFT_OUT}train_teacher"])
            lineage |= {"method": "sft", **facts, "long_prompts": long, **fitting.trained_here(run)}
        write_record(teacher_out, lineage=lineage, figures=figures)
        fitting.log_outcome(run, figures, lineage, io.output_uri("tuned_teacher"))

    io.write()
    if settings.enabled:
        checkpoints.remove()


if __name__ == "__main__":
    run_step(main)
