"""Step `evaluate`: greedy answers to the test set and the held-out sets, scored with their tasks' metrics."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from skd_lib.config import DataConfig, TaskConfig, parse_section
from skd_lib.config.step import STEP_HELP, StepConfig
from skd_lib.records import copy_record
from skd_lib.steps.inputs import present
from skd_lib.steps.options import Experiment, TrackingUri
from skd_lib.steps.runtime import StepIO, run_step, step_name

if TYPE_CHECKING:
    from skd_lib.data.prepared import PreparedData
    from skd_lib.evaluation.evaluate import HeldOutSet
    from skd_lib.evaluation.predictions import Prediction
    from skd_lib.tracking.runs import StepRun

DATA_HELP = "Folder that `prepare_data` wrote; its test split and held-out sets are used."
MAX_TABLE_ROWS = 500
MAX_TABLE_CHARACTERS = 4000


class Role(StrEnum):
    """Which model of the run is evaluated."""

    teacher_base = "teacher_base"
    teacher = "teacher"
    student_before = "student_before"
    student_after = "student_after"


def main(
    model: Annotated[Path, typer.Option(help="Folder of the model, in Hugging Face layout.")],
    data: Annotated[Path, typer.Option(help=DATA_HELP)],
    role: Annotated[Role, typer.Option(help="Which model of the run this is; names the results.")],
    evaluation_out: Annotated[
        Path, typer.Option(help="Folder for scores and answers, see `skd_lib.report.evaluations`.")
    ],
    config: Annotated[str, typer.Option(help=STEP_HELP)] = "{}",
    tracking_uri: TrackingUri = "",
    experiment: Experiment = "skd",
) -> None:
    """Answer the test set and the held-out sets by greedy decoding and score the answers.

    Each score comes with its 95 % bootstrap interval and, where the metric has one, its signature. `scores.json` holds
    {role, label, METRIC: {score, low, high, signature}, ..., examples, seconds}, where there are any with `held_out`:
    {SET: the same} and `missing`: {METRIC: reason}. The record of the model's training is copied along, so that later
    steps need not fetch the model.
    """
    from skd_lib.tracking.runs import step_run

    io = StepIO({"evaluation": evaluation_out})
    settings = parse_section(StepConfig, config, where="--config")
    name = step_name(f"evaluate-{role.value}", settings.label)
    params = {"role": role.value, **evaluation_params(settings)}
    with step_run(step=name, tracking_uri=tracking_uri, experiment=experiment, params=params) as run:
        data_uri = io.input_uri("data", data)
        evaluate_model(model, data, role, evaluation_out, settings, run, data_uri=data_uri)
    io.write()


def evaluation_params(settings: StepConfig) -> dict[str, Any]:
    """What MLflow is told of how models are evaluated."""
    return settings.model_dump(include={"seed", "evaluation", "task"})


def evaluate_models(
    models: Mapping[Role, Path], data: Path, folder: Path, settings: StepConfig, run: StepRun, *, data_uri: str
) -> None:
    """Evaluate several models, one after the other; the arguments are those of `evaluate_model`.

    Each has a folder below `folder`, and its figures a prefix: the name of its role.
    """
    for role, model in models.items():
        evaluate_model(
            model, data, role, folder / role.value, settings, run, data_uri=data_uri, prefix=f"{role.value}."
        )


def evaluate_model(
    model: Path,
    data: Path,
    role: Role,
    folder: Path,
    settings: StepConfig,
    run: StepRun,
    *,
    data_uri: str = "",
    prefix: str = "",
) -> None:
    """Evaluate one model.

    Args:
        model: Folder of the model.
        data: Folder of the prepared data.
        role: Which model of the run it is.
        folder: Takes scores and answers, see `skd_lib.report.evaluations`.
        settings: Its sections `evaluation` and `task`, the seed of the bootstrap, and the label, which says which trial
            of a comparison the model is from.
        run: Takes the figures.
        data_uri: Of the data, for MLflow.
        prefix: Of the names under which `run` takes them.

    Raises:
        SkdError: an input is gone, or the model cannot be loaded.
    """
    present("model", model)
    present("data", data)

    from skd_lib.data.prepared import PreparedData
    from skd_lib.evaluation.evaluate import evaluate, evaluate_held_out
    from skd_lib.evaluation.inference import load_for_inference
    from skd_lib.models.precision import resolve_precision
    from skd_lib.report.evaluations import PREDICTIONS, write_evaluation

    evaluation, task, seed = settings.evaluation, settings.task, settings.seed
    prepared = PreparedData.load(data)
    sets = {"test": ("test.jsonl", prepared.test)}
    sets |= {name: (f"held_out/{name}.jsonl", rows) for name, rows in prepared.held_out.items()}
    for name, (file, rows) in sets.items():
        run.log_dataset(name, prepared.manifest["sha256"][file], data_uri, context="test", rows=len(rows))
    language_model, tokenizer = load_for_inference(model)
    result = evaluate(language_model, tokenizer, prepared.test, task, evaluation, seed=seed)
    further = evaluate_held_out(language_model, tokenizer, held_out_sets(prepared, task), evaluation, seed=seed)

    write_evaluation(folder, role.value, settings.label, result, further)
    copy_record(model, folder)

    figures = result.figures()
    for name, each in further.items():
        figures |= {f"{name}.{figure}": value for figure, value in each.figures().items()}
    run.log_metrics({f"{prefix}{name}": value for name, value in figures.items()})
    signatures = {name: value["signature"] for name, value in result.scores.items() if _is_score(value)}
    run.set_tags(
        {
            "precision": resolve_precision("auto", language_model.device),
            **{f"signature.{name}": signature for name, signature in signatures.items()},
        }
    )
    run.log_artifact(folder / PREDICTIONS, prefix.rstrip(".") or None)
    run.log_table(table(result.predictions), f"{prefix}predictions")
    for name, each in further.items():
        run.log_table(table(each.predictions), f"held_out/{prefix}{name}")


def held_out_sets(prepared: PreparedData, task: TaskConfig) -> dict[str, HeldOutSet]:
    """The held-out sets that the data was prepared with, those that are missing included."""
    from skd_lib.evaluation.evaluate import HeldOutSet

    config = DataConfig.model_validate(prepared.manifest["config"])
    return {
        each.name: HeldOutSet(
            task.with_fields_of(each.task), prepared.held_out.get(each.name, []), prepared.missing.get(each.name, "")
        )
        for each in config.held_out
    }


def table(predictions: list[Prediction]) -> dict[str, list[Any]]:
    """The first rows by column, texts shortened, for people to read."""
    rows = predictions[:MAX_TABLE_ROWS]
    texts = ("id", "source", "target", "prediction")
    columns: dict[str, list[Any]] = {name: [_shortened(getattr(row, name)) for row in rows] for name in texts}
    metrics = dict.fromkeys(name for row in rows for name in row.scores)
    columns |= {name: [row.scores.get(name) for row in rows] for name in metrics}
    return columns | {"tokens": [row.tokens for row in rows], "truncated": [row.truncated for row in rows]}


def _shortened(text: str) -> str:
    # Half a surrogate pair has no form in UTF-8.
    return text[:MAX_TABLE_CHARACTERS].encode("utf-8", "backslashreplace").decode()


def _is_score(value: Any) -> bool:
    return isinstance(value, dict) and "signature" in value


if __name__ == "__main__":
    run_step(main)
