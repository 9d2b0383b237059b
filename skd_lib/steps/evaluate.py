"""Step `evaluate`: greedy answers to the test set and the held-out sets, scored with their tasks' metrics."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from skd_lib.config import DataConfig, parse_section
from skd_lib.config.step import STEP_HELP, StepConfig
from skd_lib.models.records import copy_record, write_record
from skd_lib.steps.runtime import Experiment, StepIO, TrackingUri, present, run_step, step_name

if TYPE_CHECKING:
    from skd_lib.data.prepared import PreparedData
    from skd_lib.evaluation.evaluate import Evaluation, HeldOutSet
    from skd_lib.evaluation.predictions import Prediction
    from skd_lib.results import DataUse
    from skd_lib.tracking.runs import StepRun

log = logging.getLogger(__name__)
DATA_HELP = "Folder that `prepare_data` wrote; its test split and held-out sets are used."
MAX_TABLE_ROWS = 500
MAX_TABLE_CHARACTERS = 4000


class Role(StrEnum):
    """The model of the run that is evaluated."""

    teacher_base = "teacher_base"
    teacher = "teacher"
    student_before = "student_before"
    student_after = "student_after"


@dataclass(frozen=True)
class Measured:
    """The evaluation of one model, on the test set and on each held-out set by its name; `data` is all of the run's.

    With `private` their texts are not sent to MLflow (`data.private`).
    """

    test: Evaluation
    held_out: Mapping[str, Evaluation]
    data: Sequence[DataUse] = ()
    private: bool = False

    def figures(self) -> dict[str, float]:
        """Return the numbers alone, those of a held-out set as SET.FIGURE."""
        further = {
            f"{name}.{figure}": value
            for name, each in self.held_out.items()
            for figure, value in each.figures().items()
        }
        return self.test.figures() | further


def main(
    model: Annotated[Path, typer.Option(help="Folder of the model, in Hugging Face layout.")],
    data: Annotated[Path, typer.Option(help=DATA_HELP)],
    role: Annotated[Role, typer.Option(help="Which model of the run this is; names the results.")],
    evaluation_out: Annotated[Path, typer.Option(help="Folder for scores and answers, see `skd_lib.report.folders`.")],
    config: Annotated[
        str,
        typer.Option(
            help=f"{STEP_HELP}: `evaluation`, `task`, `held_out`, `seed`, `label`. `skd config` lists their fields."
        ),
    ] = "{}",
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
        measured = measure(model, data, settings, run, data_uri=io.input_uri("data", data))
        write(measured, role, evaluation_out, settings.label, run, model_uri=io.input_uri("model", model))
        copy_record(model, evaluation_out)
    io.write()


def evaluation_params(settings: StepConfig) -> dict[str, Any]:
    """Return the settings of an evaluation, for MLflow."""
    return settings.model_dump(include={"seed", "evaluation", "task"})


def evaluate_models(
    models: Mapping[Role, Path],
    data: Path,
    folder: Path,
    settings: StepConfig,
    run: StepRun,
    *,
    data_uri: str,
    uris: Mapping[Role, str],
    origins: Mapping[Role, Mapping[str, Any]] | None = None,
) -> None:
    """Evaluate several models, one after the other; a model that equals an earlier one is not measured again.

    `folder` gets a folder for each role, and `run` the figures, as ROLE/FIGURE. `uris` says where the models are;
    `origins` holds the lineage of models that no step has made, for their evaluation's record.
    """
    from skd_lib.models.importing import same_model

    found: dict[Path, Measured] = {}
    for role, model in models.items():
        twin = next((earlier for earlier in found if same_model(earlier, model)), model)
        if twin in found:
            log.info("%s is the same model as the one before, and is not measured again", role.value)
        else:
            what = f"evaluating {role.value}" if len(models) > 1 else "evaluating"
            found[twin] = measure(model, data, settings, run, data_uri=data_uri, what=what)
        to = folder / role.value
        write(found[twin], role, to, settings.label, run, model_uri=uris[role], prefix=f"{role.value}/")
        if origins and role in origins:
            write_record(folder / role.value, lineage=origins[role])
        else:
            copy_record(model, folder / role.value)


def measure(
    model: Path, data: Path, settings: StepConfig, run: StepRun, *, data_uri: str, what: str = "evaluating"
) -> Measured:
    """Let a model answer the test set and the held-out sets, and score the answers; log the data to `run`."""
    present("model", model)
    present("data", data)

    from skd_lib.data.prepared import PreparedData
    from skd_lib.evaluation.evaluate import evaluate, evaluate_held_out
    from skd_lib.evaluation.generate import load_for_inference
    from skd_lib.evaluation.served import remote_teacher

    evaluation, task, seed = settings.evaluation, settings.task, settings.seed
    prepared = PreparedData.load(data)
    used = _data_of(prepared, data_uri)
    for each in used:
        if each.context == "test":
            run.log_dataset(**each.model_dump())
    remote = remote_teacher(model, task, private=prepared.private)
    language_model, tokenizer = (remote, remote.tokenizer) if remote else load_for_inference(model)
    measured = Measured(
        evaluate(
            language_model,
            tokenizer,
            prepared.test,
            task,
            evaluation,
            seed=seed,
            private=prepared.private,
            what=what,
        ),
        evaluate_held_out(
            language_model,
            tokenizer,
            held_out_sets(prepared, settings),
            evaluation,
            seed=seed,
            private=prepared.private,
        ),
        used,
        prepared.private,
    )
    if remote:
        run.log_metrics({f"final/{name}": value for name, value in remote.costs().items()})
    return measured


def _data_of(prepared: PreparedData, uri: str) -> list[DataUse]:
    from skd_lib.data.prepared import SPLITS
    from skd_lib.results import DataUse

    contexts = {"validation": "validation", "test": "test"}
    files = {name: (f"{name}.jsonl", contexts.get(name, "train"), getattr(prepared, name)) for name in SPLITS}
    files |= {name: (f"held_out/{name}.jsonl", "test", rows) for name, rows in prepared.held_out.items()}
    digests = prepared.manifest["sha256"]
    return [
        DataUse(name=name, digest=digests[file], source=uri, context=context, rows=len(rows))
        for name, (file, context, rows) in files.items()
    ]


def write(
    measured: Measured, role: Role, folder: Path, label: str, run: StepRun, *, model_uri: str, prefix: str = ""
) -> None:
    """Write a model's evaluation, all but the record of its training, and give MLflow the figures under `prefix`."""
    from skd_lib.models.loading import default_device
    from skd_lib.models.precision import resolve_precision
    from skd_lib.report.folders import PREDICTIONS, write_evaluation

    write_evaluation(
        folder, role.value, label, measured.test, measured.held_out, model_uri=model_uri, data=measured.data
    )
    run.log_metrics({f"{prefix}{name}": value for name, value in measured.figures().items()})
    run.set_tags(
        {
            "precision": resolve_precision("auto", default_device()),
            **{f"signature.{name}": score.signature for name, score in measured.test.scores.metrics.items()},
        }
    )
    if measured.private:
        return
    run.log_artifact(folder / PREDICTIONS, prefix.rstrip("/") or None)
    run.log_table(table(measured.test.predictions), f"{prefix}predictions")
    for name, each in measured.held_out.items():
        run.log_table(table(each.predictions), f"held_out/{prefix}{name}")


def held_out_sets(prepared: PreparedData, settings: StepConfig) -> dict[str, HeldOutSet]:
    """Return the held-out sets that the data was prepared with, missing ones included, and their tasks."""
    from skd_lib.evaluation.evaluate import HeldOutSet

    config = DataConfig.model_validate(prepared.manifest["config"])
    return {
        each.name: HeldOutSet(
            settings.held_out.get(each.name) or settings.task.with_fields_of(each.task),
            prepared.held_out.get(each.name, []),
            prepared.missing.get(each.name, ""),
        )
        for each in config.held_out
    }


def table(predictions: list[Prediction]) -> dict[str, list[Any]]:
    """Return the first rows by column, texts shortened, for people to read."""
    rows = predictions[:MAX_TABLE_ROWS]
    columns: dict[str, list[Any]] = {
        # Half a surrogate pair has no form in UTF-8.
        name: [getattr(row, name)[:MAX_TABLE_CHARACTERS].encode("utf-8", "backslashreplace").decode() for row in rows]
        for name in ("id", "source", "target", "prediction")
    }
    metrics = dict.fromkeys(name for row in rows for name in row.scores)
    columns |= {name: [row.scores.get(name) for row in rows] for name in metrics}
    return columns | {"tokens": [row.tokens for row in rows], "truncated": [row.truncated for row in rows]}


if __name__ == "__main__":
    run_step(main)
