"""Step `specdec_benchmark`: how much the student saves its teacher as a draft model, before and after distillation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from skd_lib.config import parse_section
from skd_lib.config.step import STEP_HELP, StepConfig
from skd_lib.models.files import served_in
from skd_lib.report.folders import write_drafts
from skd_lib.steps.runtime import Experiment, StepIO, TrackingUri, present, run_step, step_name


def main(
    teacher: Annotated[Path, typer.Option(help="Folder of the teacher, in Hugging Face layout.")],
    draft_before: Annotated[Path, typer.Option(help="Folder of the student before distillation, likewise.")],
    draft_after: Annotated[Path, typer.Option(help="Folder of the student after distillation.")],
    data: Annotated[Path, typer.Option(help="Folder that `prepare_data` wrote; its first test prompts are used.")],
    drafts_out: Annotated[
        Path, typer.Option(help="Folder for the figures of both: before.json and after.json, with the label.")
    ],
    config: Annotated[str, typer.Option(help=STEP_HELP)] = "{}",
    tracking_uri: TrackingUri = "",
    experiment: Experiment = "skd",
) -> None:
    """Let both students draft for the teacher, and compare with the teacher decoding alone, all in turns.

    Reported are the share of drafted tokens that the teacher accepts, by position, tokens for each teacher call, the
    wall-clock speed-up beside the theoretical one, for several draft lengths, batch sizes and temperatures, latencies,
    and the command that serves the pair with vLLM. At temperature 0 every answer is compared with the teacher's own,
    token by token; a difference that rounding does not explain fails the step. With `specdec.engine: vllm` it is vLLM
    that decodes, one server after the other, and its counters that are reported; the step installs vLLM where its
    environment is missing. Both files hold {label, acceptance_rate, tokens_per_teacher_call, speedup, ...}; without
    `drafts` in the settings, or with a teacher on a server, the label only.
    """
    settings = parse_section(StepConfig, config, where="--config")
    specdec, task, seed, label = settings.specdec, settings.task, settings.seed, settings.label
    io = StepIO({"drafts": drafts_out})
    if not settings.drafts or served_in(teacher):
        write_drafts(drafts_out, label, {})
        io.write()
        return
    inputs = {"teacher": teacher, "draft_before": draft_before, "draft_after": draft_after, "data": data}
    for name, folder in inputs.items():
        present(name, folder)

    from skd_lib._core.events import Progress
    from skd_lib.data.prepared import PreparedData
    from skd_lib.models.loading import default_device
    from skd_lib.models.precision import resolve_precision
    from skd_lib.specdec.benchmark import measure
    from skd_lib.specdec.vllm import Served
    from skd_lib.tracking.runs import step_run

    params = settings.model_dump(include={"seed", "specdec", "task"})
    name = step_name("specdec_benchmark", label)
    with step_run(step=name, tracking_uri=tracking_uri, experiment=experiment, params=params) as run:
        prepared = PreparedData.load(data)
        digest = prepared.manifest["sha256"]["test.jsonl"]
        run.log_dataset("test", digest, io.input_uri("data", data), context="test", rows=len(prepared.test))
        results = measure(
            Served(teacher, io.input_uri("teacher", teacher)),
            {
                "before": Served(draft_before, io.input_uri("draft_before", draft_before)),
                "after": Served(draft_after, io.input_uri("draft_after", draft_after)),
            },
            [example.question for example in prepared.test],
            task=task,
            config=specdec,
            seed=seed,
            on_progress=Progress("speculative decoding").update_of,
        )
        outputs = {moment: result.to_dict() for moment, result in results.items()}
        figures = {
            f"draft_{moment}/{name}": value
            for moment, result in results.items()
            for name, value in result.metrics().items()
        }
        write_drafts(drafts_out, label, outputs)
        run.log_metrics(figures)
        if specdec.engine == "transformers":
            run.set_tags({"precision": resolve_precision("auto", default_device())})
        run.log_text(json.dumps(outputs, indent=2) + "\n", "specdec.json")

    io.write()


if __name__ == "__main__":
    run_step(main)
