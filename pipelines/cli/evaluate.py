"""`skd evaluate`: the scores of any model on a task, and whether another one is as good."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from skd_kfp.pipelines.cli.options import AsJson, say_json, show_progress
from skd_lib.errors import SkdError

if TYPE_CHECKING:
    from skd_lib._core.format import TextTable
    from skd_lib.config import EvaluationConfig, TaskConfig
    from skd_lib.data.examples import Example
    from skd_lib.evaluation.evaluate import Evaluation
    from skd_lib.results import Difference


def evaluate(
    model: Annotated[str, typer.Argument(help="The model: a folder, a hub id or another reference.")],
    baseline: Annotated[
        str | None, typer.Option(help="A second model; each score is tested against it, on the same examples.")
    ] = None,
    run_config: Annotated[
        Path | None,
        typer.Option(
            "--config",
            help="A run's YAML file: its test set, its task, its section evaluation.",
            show_default="that of the run whose folder MODEL is in",
        ),
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="Examples instead: a data file (JSONL, JSON, CSV, TSV, Parquet), local or gs://.")
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(help="Task by name (gsm8k, translation, ...) or YAML file.", show_default="the config's"),
    ] = None,
    source: Annotated[str, typer.Option(help="Column of --data that holds the input.")] = "source",
    target: Annotated[str, typer.Option(help="Column of --data that holds the reference.")] = "target",
    examples: Annotated[int | None, typer.Option(min=1, help="Use the first so many.", show_default="all")] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**31 - 1, help="Of the bootstrap; decoding is greedy.")] = 0,
    predictions: Annotated[Path | None, typer.Option(help="Folder for the answers, a file a model.")] = None,
    as_json: AsJson = False,
) -> None:
    """Answer a test set by greedy decoding, and score the answers with 95 % intervals.

    With --baseline, the second table holds the paired difference (MODEL minus baseline) and its p-value.

    Examples: `skd evaluate runs/demo/student --baseline runs/demo/teacher`,
    `skd evaluate org/model --data test.jsonl --task gsm8k --json`.
    """
    from skd_lib.evaluation.predictions import compare, write_predictions
    from skd_lib.models.references import parse_reference
    from skd_lib.report.card import config_of
    from skd_lib.storage import check_writable

    show_progress()
    for reference in (model, baseline):
        if reference is not None:
            parse_reference(reference)  # a misspelt path is told first
    if run_config is None and (data is None or task is None):
        run_config = config_of(Path(model))
    rows, settings, config = _what_to_answer(run_config, data, task, source, target, examples)
    if predictions is not None:
        predictions.mkdir(parents=True, exist_ok=True)
        check_writable(str(predictions))
    found = _measured(
        {"model": model, **({} if baseline is None else {"baseline": baseline})}, rows, settings, config, seed
    )
    differences = (
        {}
        if baseline is None
        else compare(
            [found["model"].predictions], [found["baseline"].predictions], resamples=config.bootstrap_samples, seed=seed
        )
    )
    if predictions is not None:
        for name, each in found.items():
            write_predictions(predictions / f"{name}.jsonl", each.predictions)
    if as_json:
        figures: dict[str, Any] = {
            name: {"reference": reference, **found[name].scores.flat()}
            for name, reference in (("model", model), ("baseline", baseline))
            if name in found
        }
        tests = {name: {**difference.model_dump(), "examples": n} for name, (difference, n) in differences.items()}
        say_json(figures | ({"difference": tests} if tests else {}))
        return

    from skd_lib._core.terminal import Console

    console = Console()
    console.print(_scores({"model": model, "baseline": baseline}, found).to_rich())
    if differences:
        console.print(_differences({name: difference for name, (difference, _) in differences.items()}).to_rich())


def _what_to_answer(
    run_config: Path | None, data: str | None, task: str | None, source: str, target: str, limit: int | None
) -> tuple[Sequence[Example], TaskConfig, EvaluationConfig]:
    from skd_lib.config import Columns, EvaluationConfig, FilesSource, TaskConfig, load_config, parse_section
    from skd_lib.data import sources
    from skd_lib.data.splits import make_splits
    from skd_lib.evaluation.evaluate import check_answers

    if run_config is None and data is None:
        hint = "give --config RUN.yaml, or --data FILE --task NAME"
        raise SkdError("there are no examples to answer", where="skd evaluate", hint=hint)
    run = None if run_config is None else load_config(run_config)
    if run is None and task is None:
        raise SkdError("no task is named", where="--data", hint="give --task: prompt, lengths and metrics")
    settings = (
        run.task if run is not None and task is None else parse_section(TaskConfig, {"name": task}, where="--task")
    )
    if data is not None:
        files = FilesSource(train=[data], columns=Columns(source=source, target=target))
        rows = sources.load(files, max_rows=limit).train
        check_answers(rows, where=data)
    else:
        assert run is not None  # noqa: S101 - one of the two was given
        rows = make_splits(sources.load_data(run.data), run.data, run.seed).test
    return rows[:limit], settings, EvaluationConfig() if run is None else run.evaluation


def _measured(
    models: Mapping[str, str], rows: Sequence[Example], task: TaskConfig, config: EvaluationConfig, seed: int
) -> dict[str, Evaluation]:
    from transformers.utils.logging import disable_progress_bar

    from skd_lib.data.chat import check_rendering
    from skd_lib.interface import evaluate as score
    from skd_lib.models.files import load_tokenizer
    from skd_lib.models.references import resolve_model

    disable_progress_bar()  # of loading weights
    folders = {name: resolve_model(reference) for name, reference in models.items()}
    for folder in folders.values():  # before the first of them answers
        check_rendering(load_tokenizer(folder), task)
    return {name: score(folder, rows, task, config=config, seed=seed) for name, folder in folders.items()}


def _scores(references: Mapping[str, str | None], found: Mapping[str, Evaluation]) -> TextTable:
    from skd_lib._core.format import TextTable
    from skd_lib.report.names import metric_name
    from skd_lib.report.render import UNSURE

    names = list(dict.fromkeys(name for each in found.values() for name in each.scores.metrics))
    rows = []
    for which, each in found.items():
        scores = (each.scores.metrics.get(name) for name in names)
        cells = [
            "" if one is None else f"{one.score:.1f} [{one.low:.1f}, {one.high:.1f}]{UNSURE if one.caution else ''}"
            for one in scores
        ]
        rows.append([str(references[which]), *cells, str(each.scores.examples)])
    cautions = dict.fromkeys(
        one.caution for each in found.values() for one in each.scores.metrics.values() if one.caution
    )
    note = "\n".join(f"{UNSURE} {caution}" for caution in cautions)
    return TextTable("Scores (95 % interval)", ["model", *map(metric_name, names), "examples"], rows, note=note)


def _differences(differences: Mapping[str, Difference]) -> TextTable:
    from skd_lib._core.format import TextTable
    from skd_lib.report.names import metric_name

    rows = [
        [
            metric_name(metric),
            f"{one.difference:+.1f}",
            f"[{one.low:+.1f}, {one.high:+.1f}]",
            "too few examples" if one.p_value is None else f"{one.p_value:.3f}",
        ]
        for metric, one in differences.items()
    ]
    return TextTable("Model minus baseline, paired", ["metric", "difference", "95 % interval", "p"], rows)
