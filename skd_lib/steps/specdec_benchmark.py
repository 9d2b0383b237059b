"""Step `specdec_benchmark`: how much the student saves its teacher as a draft model."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from skd_lib.config import SpecdecConfig, TaskConfig, parse_section
from skd_lib.steps.runtime import EXECUTOR_INPUT_HELP, StepIO, run_step


class Role(StrEnum):
    """The draft model: the student before or after distillation."""

    before = "before"
    after = "after"


def main(
    teacher: Annotated[Path, typer.Option(help="Folder of the teacher, in Hugging Face layout.")],
    draft: Annotated[Path, typer.Option(help="Folder of the student that drafts, in Hugging Face layout.")],
    data: Annotated[Path, typer.Option(help="Folder that `prepare_data` wrote; its first test prompts are used.")],
    role: Annotated[Role, typer.Option(help="The student before or after distillation; names the results.")],
    metrics_out: Annotated[Path, typer.Option(help="Where the figures go: JSON, numbers only.")],
    config: Annotated[str, typer.Option(help="Section `specdec` of the run's config, as JSON.")] = "{}",
    task_config: Annotated[str, typer.Option(help="Section `task` of the run's config, as JSON.")] = "{}",
    seed: Annotated[int, typer.Option(min=0, help="Seed of sampling; without effect at temperature 0.")] = 0,
    tracking_uri: Annotated[str, typer.Option(help="MLflow tracking URI; empty: no tracking.")] = "",
    experiment: Annotated[str, typer.Option(help="MLflow experiment.")] = "skd",
    executor_input: Annotated[str | None, typer.Option(help=EXECUTOR_INPUT_HELP)] = None,
) -> None:
    """Let the student draft for its teacher, and compare with the teacher decoding alone, in the same run.

    Reported are the share of drafted tokens that the teacher accepts, tokens for each teacher call and the wall-clock
    speed-up. At temperature 0 every answer is compared with the teacher's own, token by token; a difference that
    rounding does not explain fails the step. Output parameter `result`: {acceptance_rate, tokens_per_teacher_call,
    speedup, ...}.
    """
    settings = parse_section(SpecdecConfig, config, where="--config")
    task = parse_section(TaskConfig, task_config, where="--task-config")
    io = StepIO(executor_input, {"metrics": metrics_out})

    from skd_lib.data.prepared import PreparedData
    from skd_lib.data.tokenize import encode_prompt
    from skd_lib.evaluation.inference import ending_ids, load_for_inference
    from skd_lib.models.loading import pad_id
    from skd_lib.specdec.benchmark import benchmark
    from skd_lib.storage import write_text_atomic
    from skd_lib.tracking.runs import step_run

    params = {"role": role.value, "seed": seed, "specdec": settings.model_dump(), "task": task.model_dump()}
    with step_run(
        step=f"specdec_benchmark-{role.value}", tracking_uri=tracking_uri, experiment=experiment, params=params
    ) as run:
        prepared = PreparedData.load(data)
        examples = prepared.test[: settings.examples]
        digest = prepared.manifest["sha256"]["test.jsonl"]
        run.log_dataset("test", digest, io.input_uri("data", data), context="test", rows=len(prepared.test))
        teacher_model, tokenizer = load_for_inference(teacher)
        draft_model, _ = load_for_inference(draft)
        result = benchmark(
            teacher_model,
            draft_model,
            [encode_prompt(tokenizer, task, example.source) for example in examples],
            eos_ids=ending_ids(teacher_model, tokenizer, task),
            pad_id=pad_id(tokenizer),
            max_new_tokens=task.max_new_tokens,
            gamma=settings.gamma,
            batch_size=settings.batch_size,
            temperature=settings.temperature,
            repeats=settings.repeats,
            seed=seed,
        ).to_dict()

        write_text_atomic(metrics_out, json.dumps(result, indent=2) + "\n")
        run.log_metrics(result)

    io.metrics("metrics", result)
    io.parameter("result", result)
    io.write()


if __name__ == "__main__":
    run_step(main)
