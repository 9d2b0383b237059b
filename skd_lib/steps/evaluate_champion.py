"""Step `evaluate_champion`: the registered champion on this run's data, and as a draft beside the new student."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from skd_lib.config import EvaluationConfig, RegistryConfig, SpecdecConfig, TaskConfig, parse_section
from skd_lib.errors import SkdError
from skd_lib.models.files import weights_digest
from skd_lib.steps.runtime import EXECUTOR_INPUT_HELP, StepIO, run_step
from skd_lib.storage import write_text_atomic

if TYPE_CHECKING:
    from skd_lib.data.examples import Example
    from skd_lib.evaluation.evaluate import Evaluation
    from skd_lib.specdec.vllm import Served
    from skd_lib.tracking.gate import Rival
    from skd_lib.tracking.registry import Champion

log = logging.getLogger(__name__)


def main(
    student: Annotated[Path, typer.Option(help="Folder of the new student, in Hugging Face layout.")],
    teacher: Annotated[Path, typer.Option(help="Folder of the teacher that both draft for, likewise.")],
    data: Annotated[Path, typer.Option(help="Folder that `prepare_data` wrote; its test split is used.")],
    predictions_out: Annotated[Path, typer.Option(help="Where the champion's answers go: JSONL, as of `evaluate`.")],
    metrics_out: Annotated[Path, typer.Option(help="Where the figures go: JSON, numbers only.")],
    registry_config: Annotated[str, typer.Option(help="Section `registry` of the run's config, as JSON.")] = "{}",
    evaluation_config: Annotated[str, typer.Option(help="Section `evaluation` of the run's config, as JSON.")] = "{}",
    specdec_config: Annotated[
        str, typer.Option(help="Section `specdec` of the run's config, as JSON; its headline setting is measured.")
    ] = "{}",
    task_config: Annotated[str, typer.Option(help="Section `task` of the run's config, as JSON.")] = "{}",
    seed: Annotated[int, typer.Option(min=0, help="Seed of the bootstrap and of sampling.")] = 0,
    tracking_uri: Annotated[str, typer.Option(help="MLflow tracking URI; empty: no tracking, no champion.")] = "",
    experiment: Annotated[str, typer.Option(help="MLflow experiment.")] = "skd",
    executor_input: Annotated[str | None, typer.Option(help=EXECUTOR_INPUT_HELP)] = None,
) -> None:
    """Measure the registered champion as the new student has been: on the same data, as a draft of the same teacher.

    As drafts both take turns, so that their speed-ups compare. Done at once where there is no champion, or where it has
    the new student's weights. One that cannot be loaded is no failure: the gate says why it leaves it in place. Output
    parameter `champion`: {version, is_this_student, figures, speedup, challenger_speedup, missing, undrafted}.
    """
    from skd_lib.tracking.gate import Rival
    from skd_lib.tracking.registry import champion as registered
    from skd_lib.tracking.registry import step_patience
    from skd_lib.tracking.runs import step_run

    registry = parse_section(RegistryConfig, registry_config, where="--registry-config")
    evaluation = parse_section(EvaluationConfig, evaluation_config, where="--evaluation-config")
    specdec = parse_section(SpecdecConfig, specdec_config, where="--specdec-config").headline()
    task = parse_section(TaskConfig, task_config, where="--task-config")
    io = StepIO(executor_input, {"predictions": predictions_out, "metrics": metrics_out})
    write_text_atomic(predictions_out, "")
    figures: dict[str, float] = {}
    rival = Rival()

    params = {"seed": seed, "evaluation": evaluation.model_dump(), "specdec": specdec.model_dump()}
    with step_run(step="evaluate_champion", tracking_uri=tracking_uri, experiment=experiment, params=params) as run:
        champion = None
        if tracking_uri:
            champion = registered(tracking_uri=tracking_uri, model_name=registry.model_name, patience=step_patience())
        if champion is not None and champion.weights_sha256 == _digest_of(student, io):
            rival = Rival(version=champion.version, is_this_student=True)
        elif champion is not None:
            from skd_lib.data.prepared import PreparedData
            from skd_lib.evaluation.predictions import write_predictions
            from skd_lib.report.summary import Scores
            from skd_lib.specdec.vllm import Served

            prepared = PreparedData.load(data)
            digest = prepared.manifest["sha256"]["test.jsonl"]
            run.log_dataset("test", digest, io.input_uri("data", data), context="test", rows=len(prepared.test))
            try:
                folder = fetch(champion)
                result = _answers(folder, prepared.test, task, evaluation, seed)
            except SkdError as error:
                log.warning("the champion cannot be measured: %s", error)
                rival = Rival(version=champion.version, missing=str(error))
            else:
                write_predictions(predictions_out, result.predictions)
                figures = result.figures()
                drafting = _as_drafts(
                    Served(teacher, io.input_uri("teacher", teacher)),
                    {
                        "champion": Served(folder, champion.weights_uri),
                        "challenger": Served(student, io.input_uri("student", student)),
                    },
                    [example.source for example in prepared.test],
                    task,
                    specdec,
                    seed,
                )
                scores = Scores.model_validate(result.scores).figures()
                rival = drafting.model_copy(update={"version": champion.version, "figures": scores})
        speedups = {"speedup": rival.speedup, "challenger_speedup": rival.challenger_speedup}
        figures |= {name: value for name, value in speedups.items() if value is not None}
        run.log_metrics(figures)
        run.set_tags({"champion": rival.version, "missing": rival.missing})
    write_text_atomic(metrics_out, json.dumps(figures, indent=2) + "\n")
    print(_told(rival))

    io.metrics("metrics", figures)
    # Without nulls, which KFP has no place for.
    io.parameter("champion", rival.model_dump(mode="json", exclude_none=True))
    io.write()


def fetch(champion: Champion) -> Path:
    """The champion's folder, with the weights that were registered.

    Raises:
        SkdError: it is gone, cannot be fetched, or holds other weights.
    """
    from skd_lib.models.references import resolve_model

    where = f"champion, version {champion.version}"
    if not champion.weights_uri:
        raise SkdError("its version in the registry does not say where its weights are", where=where)
    folder = resolve_model(champion.weights_uri)
    if weights_digest(folder) != champion.weights_sha256:
        raise SkdError(f"other weights than those registered are at {champion.weights_uri}", where=where)
    return folder


def _digest_of(student: Path, io: StepIO) -> str:
    return str(io.input_metadata("student").get("weights_sha256") or weights_digest(student))


def _answers(
    folder: Path, examples: list[Example], task: TaskConfig, config: EvaluationConfig, seed: int
) -> Evaluation:
    from skd_lib.evaluation.evaluate import evaluate
    from skd_lib.evaluation.inference import load_for_inference

    model, tokenizer = load_for_inference(folder)
    return evaluate(model, tokenizer, examples, task, config, seed=seed)


def _as_drafts(
    teacher: Served, drafts: dict[str, Served], inputs: list[str], task: TaskConfig, config: SpecdecConfig, seed: int
) -> Rival:
    """Speed-ups of both, or why there are none."""
    from skd_lib.events import Progress
    from skd_lib.models.vocabulary import check_compatible
    from skd_lib.specdec.measure import measure
    from skd_lib.tracking.gate import Rival

    if unlike := check_compatible(teacher.folder, drafts["champion"].folder):
        return Rival(undrafted=str(unlike[0]))
    progress = Progress("speculative decoding")
    results = measure(teacher, drafts, inputs, task=task, config=config, seed=seed, on_progress=progress.update_of)
    return Rival(speedup=results["champion"].speedup, challenger_speedup=results["challenger"].speedup)


def _told(rival: Rival) -> str:
    if not rival.version:
        return "there is no champion"
    if rival.is_this_student:
        return f"the champion (version {rival.version}) is this very student"
    return f"the champion (version {rival.version}): {rival.missing or rival.figures}"


if __name__ == "__main__":
    run_step(main)
