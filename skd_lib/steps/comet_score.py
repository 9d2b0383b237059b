"""Step `comet_score`: all models' answers scored by COMET, where the task asks for it."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from skd_lib.ascii_json import ascii_json
from skd_lib.config import EvaluationConfig, TaskConfig, parse_section
from skd_lib.errors import SkdError
from skd_lib.report.evaluations import PREDICTIONS, read_evaluations
from skd_lib.report.summary import rounded
from skd_lib.report.untrusted import clipped
from skd_lib.steps.inputs import present
from skd_lib.steps.runtime import StepIO, run_step

log = logging.getLogger(__name__)
MISSING_LENGTH = 600
"""Characters of the reason why there is no score: it travels as a parameter of the pipeline."""


def main(
    teacher_evaluations: Annotated[
        Path, typer.Option(help="Evaluations of the teacher, before and after fine-tuning: folder of step `scores`.")
    ],
    student_evaluations: Annotated[
        Path, typer.Option(help="Evaluations of the student, before and after distillation, likewise.")
    ],
    champion: Annotated[
        Path, typer.Option(help="The registered champion: folder of step `evaluate_champion`, with or without answers.")
    ],
    segments_out: Annotated[Path, typer.Option(help="Where the score of each answer goes: JSONL.")],
    config: Annotated[str, typer.Option(help="Section `evaluation` of the run's config, as JSON.")] = "{}",
    task_config: Annotated[
        str,
        typer.Option(help="Section `task` of the run's config, as JSON; without the metric `comet` nothing is done."),
    ] = "{}",
    seed: Annotated[int, typer.Option(min=0, help="Seed of the bootstrap.")] = 0,
) -> None:
    """Score every model's answers with COMET: each answer, the mean with its 95 % interval, and paired tests.

    Where COMET or its model is not to be had, the step succeeds all the same and says why. Output parameter `scores`:
    JSON of {models: {ROLE: {score, low, high, signature}}, comparisons: {ROLE-ROLE: {difference, low, high, p_value}},
    missing, seconds}. Scores are 100 times COMET's own.
    """
    settings = parse_section(EvaluationConfig, config, where="--config")
    task = parse_section(TaskConfig, task_config, where="--task-config")
    io = StepIO({"segments": segments_out})
    started = time.perf_counter()

    from skd_lib.evaluation.predictions import read_predictions
    from skd_lib.storage import write_text_atomic

    rows: list[dict[str, Any]] = []
    scores: dict[str, Any] = {"models": {}, "comparisons": {}, "missing": ""}
    if task.wants_comet:
        from skd_lib.comet.checkpoint import open_checkpoint
        from skd_lib.comet.environment import comet_python
        from skd_lib.comet.scoring import score_models

        folders = {"teacher_evaluations": teacher_evaluations, "student_evaluations": student_evaluations}
        both = [read_evaluations(present(name, folder)) for name, folder in folders.items()]
        files: dict[str, Path] = {role: each.predictions for one in both for role, each in one.items()}
        if (answered := present("champion", champion) / PREDICTIONS).is_file():
            files["champion"] = answered
        answers = {role: read_predictions(path) for role, path in files.items()}
        try:
            result = score_models(
                answers,
                open_checkpoint(settings.comet.model),
                comet_python(),
                batch_size=settings.comet.batch_size,
                trust_pickle=settings.comet.trust_pickle,
                resamples=settings.bootstrap_samples,
                seed=seed,
            )
        except SkdError as error:
            # The run's other results do not depend on it: it goes on, and the report says what is missing.
            log.warning("COMET is missing from this run: %s", error)
            scores["missing"] = clipped(str(error), MISSING_LENGTH)
        else:
            scored = {role: score for role, score in result.scores.items() if math.isfinite(score["score"])}
            scores["models"] = {role: _short(score) for role, score in scored.items()}
            scores["comparisons"] = {pair: _short(test.known()) for pair, test in result.comparisons.items()}
            rows = [
                {"id": answer.id, "role": role, "comet": value}
                for role, values in result.segments.items()
                for answer, value in zip(answers[role], values, strict=True)
            ]
    scores["seconds"] = round(time.perf_counter() - started, 3)
    write_text_atomic(segments_out, "".join(json.dumps(row) + "\n" for row in rows))
    for role, found in scores["models"].items():
        print(f"{role}: COMET {found['score']:.2f} [{found['low']:.2f}, {found['high']:.2f}]")

    io.parameter("scores", ascii_json(scores))
    io.write()


def _short(values: Mapping[str, Any]) -> dict[str, Any]:
    """Round what is shown; the score stays exact, since it may decide."""
    return {name: rounded(x) if isinstance(x, float) and name != "score" else x for name, x in values.items()}


if __name__ == "__main__":
    run_step(main)
