"""Step `evaluate`: greedy answers to the test set, scored with the task's metrics."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from skd_lib.config import EvaluationConfig, TaskConfig, parse_section
from skd_lib.steps.runtime import EXECUTOR_INPUT_HELP, StepIO, run_step


class Role(StrEnum):
    """Which model of the run is evaluated."""

    teacher_base = "teacher_base"
    teacher = "teacher"
    student_before = "student_before"
    student_after = "student_after"


def main(
    model: Annotated[Path, typer.Option(help="Folder of the model, in Hugging Face layout.")],
    data: Annotated[Path, typer.Option(help="Folder that `prepare_data` wrote; its test split is used.")],
    role: Annotated[Role, typer.Option(help="Which model of the run this is; names the results.")],
    predictions_out: Annotated[Path, typer.Option(help="Where the answers go: JSONL, one row an example.")],
    metrics_out: Annotated[Path, typer.Option(help="Where the figures go: JSON, numbers only.")],
    config: Annotated[str, typer.Option(help="Section `evaluation` of the run's config, as JSON.")] = "{}",
    task_config: Annotated[str, typer.Option(help="Section `task` of the run's config, as JSON.")] = "{}",
    seed: Annotated[int, typer.Option(min=0, help="Seed of the bootstrap; decoding is greedy.")] = 0,
    tracking_uri: Annotated[str, typer.Option(help="MLflow tracking URI; empty: no tracking.")] = "",
    experiment: Annotated[str, typer.Option(help="MLflow experiment.")] = "skd",
    executor_input: Annotated[str | None, typer.Option(help=EXECUTOR_INPUT_HELP)] = None,
) -> None:
    """Answer the test set by greedy decoding and score the answers.

    Each score comes with its 95 % bootstrap interval and, where the metric has one, its signature. Output
    parameter `scores`: {METRIC: {score, low, high, signature}, ..., examples, seconds}.
    """
    settings = parse_section(EvaluationConfig, config, where="--config")
    task = parse_section(TaskConfig, task_config, where="--task-config")
    io = StepIO(executor_input, {"predictions": predictions_out, "metrics": metrics_out})

    from skd_lib.data.prepared import PreparedData
    from skd_lib.evaluation.evaluate import evaluate
    from skd_lib.evaluation.inference import load_for_inference
    from skd_lib.evaluation.predictions import write_predictions
    from skd_lib.storage import write_text_atomic
    from skd_lib.tracking.runs import step_run

    params = {"role": role.value, "seed": seed, "evaluation": settings.model_dump(), "task": task.model_dump()}
    with step_run(
        step=f"evaluate-{role.value}", tracking_uri=tracking_uri, experiment=experiment, params=params
    ) as run:
        prepared = PreparedData.load(data)
        digest = prepared.manifest["sha256"]["test.jsonl"]
        run.log_dataset("test", digest, io.input_uri("data", data), context="test", rows=len(prepared.test))
        language_model, tokenizer = load_for_inference(model)
        result = evaluate(language_model, tokenizer, prepared.test, task, settings, seed=seed)

        write_predictions(predictions_out, result.predictions)
        figures = result.figures()
        write_text_atomic(metrics_out, json.dumps(figures, indent=2) + "\n")
        run.log_metrics(figures)
        run.set_tags({f"signature.{name}": result.scores[name]["signature"] for name in task.own_metrics})
        run.log_artifact(predictions_out)

    io.metadata("predictions", role=role.value, rows=len(result.predictions))
    io.metrics("metrics", figures)
    io.parameter("scores", result.scores)
    io.write()


if __name__ == "__main__":
    run_step(main)
