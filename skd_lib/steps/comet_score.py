"""Step `comet_score`: all models' answers scored by COMET, where the task asks for it."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from skd_lib._core.ascii_json import ascii_json
from skd_lib._core.terminal import clipped
from skd_lib.config import parse_section
from skd_lib.config.step import STEP_HELP, StepConfig
from skd_lib.errors import SkdError
from skd_lib.report.folders import PREDICTIONS, read_evaluations
from skd_lib.results import rounded
from skd_lib.steps.runtime import Experiment, StepIO, TrackingUri, present, run_step

if TYPE_CHECKING:
    from skd_lib.evaluation.predictions import Prediction

log = logging.getLogger(__name__)
MISSING_LENGTH = 600
"""Characters of the reason why there is no score: it travels as a parameter of the pipeline."""


def main(
    teacher_evaluations: Annotated[
        Path, typer.Option(help="The teacher before and after fine-tuning: folder of step `evaluate_teacher`.")
    ],
    student_evaluations: Annotated[Path, typer.Option(help="The student before and after distillation, likewise.")],
    champion: Annotated[
        Path, typer.Option(help="The registered champion: folder of step `evaluate_champion`, with or without answers.")
    ],
    config: Annotated[str, typer.Option(help=STEP_HELP)] = "{}",
    tracking_uri: TrackingUri = "",
    experiment: Experiment = "skd",
) -> None:
    """Score every model's answers with COMET: the mean with its 95 % interval, and paired tests.

    The score of each answer goes to MLflow: `comet.jsonl`. Nothing is done where the task does not ask for COMET; where
    COMET or its model is not to be had, the step succeeds all the same and says why. Output parameter `scores`: JSON of
    {models: {ROLE: {score, low, high, signature}}, comparisons: {ROLE-ROLE: {difference, low, high, p_value}}, missing,
    seconds}. Scores are 100 times COMET's own.
    """
    from skd_lib.evaluation.predictions import read_predictions
    from skd_lib.tracking.runs import step_run

    settings = parse_section(StepConfig, config, where="--config")
    io = StepIO({})
    started = time.perf_counter()
    scores: dict[str, Any] = {"models": {}, "comparisons": {}, "missing": ""}
    if settings.task.wants_comet:
        folders = {"teacher_evaluations": teacher_evaluations, "student_evaluations": student_evaluations}
        both = [read_evaluations(present(name, folder)) for name, folder in folders.items()]
        files: dict[str, Path] = {role: each.predictions for one in both for role, each in one.items()}
        if (answered := present("champion", champion) / PREDICTIONS).is_file():
            files["champion"] = answered
        params = settings.model_dump(include={"seed": True, "evaluation": {"comet", "bootstrap_samples"}})
        with step_run(step="comet_score", tracking_uri=tracking_uri, experiment=experiment, params=params) as run:
            answers = {role: read_predictions(path) for role, path in files.items()}
            try:
                found, rows = _scored(answers, settings)
            except SkdError as error:
                # The run's other results do not depend on it: it goes on, and the report says what is missing.
                log.warning("COMET is missing from this run: %s", error)
                scores["missing"] = clipped(error.line, MISSING_LENGTH)
            else:
                scores |= found
                run.log_text("".join(json.dumps(row) + "\n" for row in rows), "comet.jsonl")
                run.log_metrics({f"{role}/comet": score["score"] for role, score in found["models"].items()})
            run.set_tags({"missing": scores["missing"]})
    scores["seconds"] = round(time.perf_counter() - started, 3)
    for role, score in scores["models"].items():
        print(f"{role}: COMET {score['score']:.2f} [{score['low']:.2f}, {score['high']:.2f}]")

    io.parameter("scores", ascii_json(scores))
    io.write()


def _scored(
    answers: Mapping[str, list[Prediction]], settings: StepConfig
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Score answers, by role: for the parameter, and a row for each answer; an SkdError if COMET is missing."""
    from skd_lib.evaluation.comet.checkpoint import open_checkpoint
    from skd_lib.evaluation.comet.environment import comet_python
    from skd_lib.evaluation.comet.scoring import score_models

    comet = settings.evaluation.comet
    result = score_models(
        answers,
        open_checkpoint(comet.model),
        comet_python(),
        batch_size=comet.batch_size,
        trust_pickle=comet.trust_pickle,
        resamples=settings.evaluation.bootstrap_samples,
        seed=settings.seed,
    )
    finite = {role: score.flat() for role, score in result.scores.items() if math.isfinite(score.score)}
    scores = {
        "models": {role: _short(score) for role, score in finite.items()},
        "comparisons": {pair: _short(test.model_dump(exclude_none=True)) for pair, test in result.comparisons.items()},
    }
    rows = [
        {"id": answer.id, "role": role, "comet": value}
        for role, values in result.segments.items()
        for answer, value in zip(answers[role], values, strict=True)
    ]
    return scores, rows


def _short(values: Mapping[str, Any]) -> dict[str, Any]:
    """Round what is shown; the score stays exact, since it may decide."""
    return {name: rounded(x) if isinstance(x, float) and name != "score" else x for name, x in values.items()}


if __name__ == "__main__":
    run_step(main)
