"""Step `compare_result`: what one run of a comparison came to, as one artifact."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import Annotated

import typer

from skd_lib.compare.result import TrialResult
from skd_lib.compare.trials import Trial
from skd_lib.config import parse_json, parse_section
from skd_lib.errors import SkdError
from skd_lib.report.summary import Course, Scores, Specdec
from skd_lib.steps.runtime import EXECUTOR_INPUT_HELP, StepIO, run_step


def main(
    trial: Annotated[str, typer.Option(help="The run, as JSON: {variant, seed, init}.")],
    scores: Annotated[str, typer.Option(help="Scores of its student: JSON of step `evaluate`.")],
    predictions: Annotated[Path, typer.Option(help="Its answers: JSONL of step `evaluate`.")],
    figures: Annotated[Path, typer.Option(help="Figures of its training: JSON of step `distill`.")],
    result_out: Annotated[Path, typer.Option(help="Folder for the result.")],
    course: Annotated[str, typer.Option(help="Course of its training: JSON of step `distill`.")] = "{}",
    draft: Annotated[
        str, typer.Option(help="Its worth as a draft: JSON of step `specdec_benchmark`; {} where it was not measured.")
    ] = "{}",
    executor_input: Annotated[str | None, typer.Option(help=EXECUTOR_INPUT_HELP)] = None,
) -> None:
    """Put the figures and answers of one run together, for step `compare_table`."""
    one = parse_section(Trial, trial, where="--trial")
    curves = parse_section(Course, course, where="--course")
    found = parse_section(Scores, scores, where="--scores")
    worth = {} if draft.strip() == "{}" else parse_section(Specdec, draft, where="--draft").figures()

    from skd_lib.compare.folder import write_result
    from skd_lib.evaluation.predictions import read_predictions

    try:
        numbers = parse_json(figures.read_text(encoding="utf-8"), where=str(figures), plain=False)
    except OSError as error:
        hint = "name the figures that step `distill` wrote"
        raise SkdError(f"cannot be read: {error.strerror}", where=str(figures), hint=hint) from error
    result = TrialResult(
        variant=one.variant,
        seed=one.seed,
        init=one.init,
        scores=found,
        rejection_rate=fmean(curves.rejection_rate) if curves.rejection_rate else None,
        tokens_per_teacher_call=numbers.pop("tokens_per_teacher_call_last_tenth", None),
        draft=worth,
        figures=numbers,
        course=curves,
    )
    io = StepIO(executor_input, {"result": result_out})
    write_result(result_out, result, read_predictions(predictions))
    io.write()


if __name__ == "__main__":
    run_step(main)
