"""Step `evaluate_champion`: the registered champion on this run's data, and as a draft beside the new student."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from skd_lib.config import SpecdecConfig, TaskConfig, parse_section
from skd_lib.config.step import STEP_HELP, StepConfig
from skd_lib.errors import SkdError, Transient
from skd_lib.models.files import check_model_folder, served_in, weights_digest
from skd_lib.report.folders import PREDICTIONS
from skd_lib.report.measured import CHAMPION
from skd_lib.steps.runtime import Experiment, StepIO, TrackingUri, present, run_step
from skd_lib.storage import write_text_atomic
from skd_lib.tracking.gate import REMEDY

if TYPE_CHECKING:
    from skd_lib.data.examples import Question
    from skd_lib.specdec.vllm import Served
    from skd_lib.tracking.gate import Rival
    from skd_lib.tracking.registry import Champion

log = logging.getLogger(__name__)
MOVE = f"{REMEDY}; then start the run again, which reuses all steps before this one"


def main(
    student: Annotated[Path, typer.Option(help="Folder of the new student, in Hugging Face layout.")],
    teacher: Annotated[Path, typer.Option(help="Folder of the teacher that both draft for, likewise.")],
    data: Annotated[Path, typer.Option(help="Folder that `prepare_data` wrote; its test split is used.")],
    champion_out: Annotated[
        Path, typer.Option(help="Folder for champion.json and, where it was measured, its answers: predictions.jsonl.")
    ],
    config: Annotated[str, typer.Option(help=STEP_HELP)] = "{}",
    tracking_uri: TrackingUri = "",
    experiment: Experiment = "skd",
) -> None:
    """Measure the registered champion as the new student has been: on the same data, as a draft of the same teacher.

    As drafts both take turns, at the headline setting of section `specdec`, so that their figures compare; with the
    gate `draft` it answers no test set. Done at once where there is no champion (so without tracking, since then there
    is no registry), or where it has the new student's weights. A champion whose files are gone fails the step, and so
    does a judge that is down; a champion that cannot be measured does not: `register_model` says why it leaves it in
    place. `champion.json` holds the fields of `skd_lib.tracking.gate.Rival`.
    """
    from skd_lib.tracking.gate import Rival
    from skd_lib.tracking.registry import champion as registered
    from skd_lib.tracking.registry import step_patience
    from skd_lib.tracking.runs import step_run

    settings = parse_section(StepConfig, config, where="--config")
    evaluation, specdec = settings.evaluation, settings.specdec.headline()
    registry, task, seed = settings.registry, settings.task, settings.seed
    io = StepIO({"champion": champion_out})
    present("data", data)
    for name, folder in {"student": student, "teacher": teacher}.items():
        check_model_folder(present(name, folder))
    champion_out.mkdir(parents=True, exist_ok=True)
    figures: dict[str, float] = {}
    rival = Rival()

    params = {"seed": seed, "evaluation": evaluation.model_dump(), "specdec": specdec.model_dump()}
    with step_run(step="evaluate_champion", tracking_uri=tracking_uri, experiment=experiment, params=params) as run:
        champion = None
        if tracking_uri:
            champion = registered(tracking_uri=tracking_uri, model_name=registry.model_name, patience=step_patience())
        if champion is not None and champion.weights_sha256 == weights_digest(student):
            rival = Rival(version=champion.version, is_this_student=True)
        elif champion is not None:
            from skd_lib.data.prepared import PreparedData
            from skd_lib.evaluation.evaluate import evaluate
            from skd_lib.evaluation.generate import load_for_inference
            from skd_lib.evaluation.judge import JudgeUnavailable
            from skd_lib.evaluation.predictions import write_predictions
            from skd_lib.specdec.vllm import Served

            prepared = PreparedData.load(data)
            digest = prepared.manifest["sha256"]["test.jsonl"]
            run.log_dataset("test", digest, io.input_uri("data", data), context="test", rows=len(prepared.test))
            folder = fetch(champion)
            try:
                check_weights(champion, folder)
                result = None
                if registry.gate == "score":
                    model, tokenizer = load_for_inference(folder)
                    result = evaluate(
                        model, tokenizer, prepared.test, task, evaluation, seed=seed, private=prepared.private
                    )
                    del model  # vLLM, which may come next, wants the GPU's memory
            except JudgeUnavailable:
                raise
            except SkdError as error:
                log.warning("the champion cannot be measured: %s", error)
                rival = Rival(version=champion.version, missing=error.line)
            else:
                scores: dict[str, float] = {}
                if result is not None:
                    write_predictions(champion_out / PREDICTIONS, result.predictions)
                    figures, scores = result.figures(), result.scores.figures()
                drafting = _as_drafts(
                    Served(teacher, io.input_uri("teacher", teacher)),
                    {
                        "champion": Served(folder, champion.weights_uri),
                        "challenger": Served(student, io.input_uri("student", student)),
                    },
                    [example.question for example in prepared.test],
                    task,
                    specdec,
                    seed,
                )
                rival = drafting.model_copy(update={"version": champion.version, "figures": scores})
        figures |= rival.as_drafts()
        run.log_metrics(figures)
        run.set_tags({"champion": rival.version, "missing": rival.missing})
    write_text_atomic(champion_out / CHAMPION, json.dumps(rival.model_dump(mode="json"), indent=2) + "\n")
    print(_told(rival))

    io.write()


def fetch(champion: Champion) -> Path:
    """Return the champion's folder, or raise SkdError if it cannot be fetched."""
    from skd_lib.models.references import resolve_model

    where = _where(champion)
    if not champion.weights_uri:
        raise SkdError("its version in the registry does not say where its weights are", where=where, hint=MOVE)
    try:
        return resolve_model(champion.weights_uri)
    except SkdError as error:
        kind = Transient if isinstance(error, Transient) else SkdError
        raise kind(f"its weights cannot be had: {error.what}", where=f"{where}, {error.where}", hint=MOVE) from error


def check_weights(champion: Champion, folder: Path) -> None:
    """Raise SkdError unless the folder holds the weights that were registered."""
    if weights_digest(folder) != champion.weights_sha256:
        raise SkdError(f"other weights than those registered are at {champion.weights_uri}", where=_where(champion))


def _where(champion: Champion) -> str:
    return f"champion, version {champion.version}"


def _as_drafts(
    teacher: Served,
    drafts: dict[str, Served],
    inputs: list[Question],
    task: TaskConfig,
    config: SpecdecConfig,
    seed: int,
) -> Rival:
    """Measure the speed-ups of both, or return the reason why there are none."""
    from skd_lib._core.events import Progress
    from skd_lib.models.vocabulary import check_compatible
    from skd_lib.results import rounded
    from skd_lib.specdec.benchmark import compare_drafts, measure
    from skd_lib.specdec.vllm import refusals
    from skd_lib.tracking.gate import Rival
    from skd_lib.vllm.serve import on_gpu

    if served := served_in(teacher.folder):
        return Rival(undrafted=f"the teacher is on a server, {served}")
    unlike = [str(error) for error in check_compatible(teacher.folder, drafts["champion"].folder)]
    if config.engine == "vllm":
        unlike += refusals(teacher, drafts["champion"], on_gpu=on_gpu())
    if unlike:
        return Rival(undrafted=unlike[0])
    progress = Progress("speculative decoding")
    results = measure(teacher, drafts, inputs, task=task, config=config, seed=seed, on_progress=progress.update_of)
    champion, challenger = results["champion"], results["challenger"]
    gain = compare_drafts(challenger, champion)
    return Rival(
        speedup=champion.speedup,
        challenger_speedup=challenger.speedup,
        tokens_per_call=champion.tokens_per_teacher_call,
        challenger_tokens_per_call=challenger.tokens_per_teacher_call,
        gain_low=gain and rounded(gain.low),
        gain_high=gain and rounded(gain.high),
    )


def _told(rival: Rival) -> str:
    if not rival.version:
        return "there is no champion"
    if rival.is_this_student:
        return f"the champion (version {rival.version}) is this very student"
    figures = ", ".join(f"{name} {value:.4g}" for name, value in (rival.figures or rival.as_drafts()).items())
    return f"the champion (version {rival.version}): {rival.missing or figures}"


if __name__ == "__main__":
    run_step(main)
