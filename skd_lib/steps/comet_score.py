"""Step `comet_score`: all models' answers scored by COMET, where the task asks for it."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from skd_lib.config import EvaluationConfig, TaskConfig, parse_section
from skd_lib.errors import SkdError
from skd_lib.steps.runtime import EXECUTOR_INPUT_HELP, StepIO, run_step

log = logging.getLogger(__name__)


def main(
    teacher_base: Annotated[Path, typer.Option(help="Answers of the teacher as it came: JSONL of step `evaluate`.")],
    teacher: Annotated[Path, typer.Option(help="Answers of the fine-tuned teacher.")],
    student_before: Annotated[Path, typer.Option(help="Answers of the student before distillation.")],
    student_after: Annotated[Path, typer.Option(help="Answers of the student after distillation.")],
    champion: Annotated[
        Path, typer.Option(help="Answers of the registered champion; an empty file where there are none.")
    ],
    segments_out: Annotated[Path, typer.Option(help="Where the score of each answer goes: JSONL.")],
    metrics_out: Annotated[Path, typer.Option(help="Where the figures go: JSON, numbers only.")],
    config: Annotated[str, typer.Option(help="Section `evaluation` of the run's config, as JSON.")] = "{}",
    task_config: Annotated[
        str,
        typer.Option(help="Section `task` of the run's config, as JSON; without the metric `comet` nothing is done."),
    ] = "{}",
    seed: Annotated[int, typer.Option(min=0, help="Seed of the bootstrap.")] = 0,
    executor_input: Annotated[str | None, typer.Option(help=EXECUTOR_INPUT_HELP)] = None,
) -> None:
    """Score every model's answers with COMET: each answer, the mean with its 95 % interval, and paired tests.

    Where COMET or its model is not to be had, the step succeeds all the same and says why. Output parameter `scores`:
    {models: {ROLE: {score, low, high, signature}}, comparisons: {ROLE-ROLE: {difference, low, high, p_value}}, missing,
    seconds}. Scores are 100 times COMET's own.
    """
    settings = parse_section(EvaluationConfig, config, where="--config")
    task = parse_section(TaskConfig, task_config, where="--task-config")
    io = StepIO(executor_input, {"segments": segments_out, "metrics": metrics_out})
    started = time.perf_counter()

    from skd_lib.evaluation.predictions import read_predictions
    from skd_lib.storage import write_text_atomic

    rows: list[dict[str, Any]] = []
    figures: dict[str, float] = {}
    scores: dict[str, Any] = {"models": {}, "comparisons": {}, "missing": ""}
    if task.wants_comet:
        from skd_lib.comet.checkpoint import open_checkpoint
        from skd_lib.comet.environment import comet_python
        from skd_lib.comet.scoring import score_models

        files = {
            "teacher_base": teacher_base,
            "teacher": teacher,
            "student_before": student_before,
            "student_after": student_after,
            "champion": champion,
        }
        answers = {role: read_predictions(path) for role, path in files.items()}
        if not answers["champion"]:
            del answers["champion"]
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
            scores["missing"] = str(error)
        else:
            figures = result.figures()
            scores["models"] = result.scores
            scores["comparisons"] = {pair: test.known() for pair, test in result.comparisons.items()}
            rows = [
                {"id": answer.id, "role": role, "comet": value}
                for role, values in result.segments.items()
                for answer, value in zip(answers[role], values, strict=True)
            ]
    scores["seconds"] = round(time.perf_counter() - started, 3)
    write_text_atomic(segments_out, "".join(json.dumps(row) + "\n" for row in rows))
    write_text_atomic(metrics_out, json.dumps(figures, indent=2) + "\n")
    for role, found in scores["models"].items():
        print(f"{role}: COMET {found['score']:.2f} [{found['low']:.2f}, {found['high']:.2f}]")

    io.metadata("segments", rows=len(rows))
    io.metrics("metrics", figures)
    io.parameter("scores", scores)
    io.write()


if __name__ == "__main__":
    run_step(main)
