"""The experiments of docs/evidence.md: data and models, runs, plots and tables.

    python docs/evidence/evidence.py --help

Run it at the root of the source tree, with the Python of `make install`.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Annotated

import typer

from page import tables, tables_over_examples, with_tables
from plots import draw
from prepare import prepare as write_start
from problems import ProblemSpace
from records import collect as write_records
from records import read_curves, read_examples, read_runs
from skd_lib._core.terminal import run_command
from skd_lib.storage import write_text_atomic
from study_results import draw_study, study_tables

FOLDER = Path("docs/evidence")
STUDY = FOLDER / "study"
MODELS = STUDY / "models"
MODELS_HELP = "Where the teacher and the base of the students are, or will be trained; default: the second teacher's."
PAGES = [Path("docs/evidence.md"), FOLDER / "diary.md"]
_PLOT = re.compile(r"\]\((?!http)([^()#]+\.svg)\)")

app = typer.Typer(
    help="The experiments of docs/evidence.md: data and models, runs, plots and tables.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)


@app.command()
def prepare(
    folder: Annotated[Path, typer.Argument(help="Where problems and models go.")] = Path("runs/arithmetic-data"),
    train: Annotated[int, typer.Option(min=1, help="Training problems.")] = 20_000,
    validation: Annotated[int, typer.Option(min=1, help="Validation problems.")] = 100,
    test: Annotated[int, typer.Option(min=1, help="Test problems.")] = 500,
    largest: Annotated[int, typer.Option(min=81, help="The largest number that comes up; each is a token.")] = 199,
    pretraining: Annotated[
        int,
        typer.Option(min=0, help="Optimiser steps of the student's pre-training; 0: it is as random as the teacher."),
    ] = 1800,
    seed: Annotated[int, typer.Option(min=0, help="Of the problems and of the models' random weights.")] = 0,
) -> None:
    """Make arithmetic problems with written-out solutions, a teacher of random weights and a pre-trained student.

    `docs/evidence/configs/arithmetic.yaml` starts from what this writes with its defaults.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")  # minutes of pre-training
    space = ProblemSpace(largest=largest)
    sizes = {"train": train, "validation": validation, "test": test}
    for path in write_start(folder, space=space, **sizes, pretraining=pretraining, seed=seed):
        typer.echo(path)


@app.command()
def collect(
    comparisons: Annotated[list[Path], typer.Argument(help="Folders of `skd compare`, e.g. runs/evidence-methods.")],
    folder: Annotated[Path, typer.Option("--out", help="Where runs.csv, curves.csv and examples.csv go.")] = FOLDER,
) -> None:
    """Put the runs of comparisons into CSV files. Other comparisons that these hold stay."""
    for path in write_records([each / "comparison.json" for each in comparisons], folder):
        typer.echo(path)


@app.command()
def study(
    folder: Annotated[Path, typer.Argument(help=MODELS_HELP)] = MODELS,
    out: Annotated[Path, typer.Option(help="Where runs.csv and curves.csv are; each run is appended.")] = STUDY,
    runs: Annotated[int | None, typer.Option(min=1, help="Runs at most; default: all that are missing.")] = None,
) -> None:
    """Run what is missing of the convergence study (docs/evidence/plan.md), one run after another.

    A run takes one to twelve minutes of one core. Stop it at any time: runs that have ended are kept, and the same
    command goes on.
    """
    from study import run_study

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for line in run_study(folder, out, runs):
        typer.echo(line)


@app.command()
def check(
    folder: Annotated[Path, typer.Argument(help=MODELS_HELP)] = MODELS,
    stored: Annotated[Path, typer.Option(help="Where runs.csv is; it stays as it is.")] = STUDY,
    runs: Annotated[int, typer.Option(min=1, help="Runs, drawn at random.")] = 5,
    seed: Annotated[int, typer.Option(min=0, help="Of the draw.")] = 0,
) -> None:
    """Run some of the study's stored runs again, and say of each whether its figures are the stored ones.

    On the CPU that they were made on, with `OMP_NUM_THREADS=1`, they are; on another one a run takes another course. A
    run takes one to twelve minutes of one core.
    """
    from study import check_study

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for line in check_study(folder, stored, runs, seed):
        typer.echo(line)


@app.command()
def plot(
    folder: Annotated[Path, typer.Argument(help="Where the CSV files are, and plots go.")] = FOLDER,
    page: Annotated[
        list[Path] | None,
        typer.Option(help="Pages whose tables are written again; default: the evidence's."),
    ] = None,
) -> None:
    """Draw the plots and write the tables of the pages from the stored results, the study's too.

    Of another folder the comparisons' tables are printed.
    """
    own = page is None and folder != FOLDER
    chosen = [] if own else page or PAGES
    runs, pages = read_runs(folder), {each: each.read_text(encoding="utf-8") for each in chosen}
    shown = {Path(link).name for text in pages.values() for link in _PLOT.findall(text)}
    written = draw(runs, read_curves(folder), folder, shown)
    place = folder / STUDY.name
    studied, curves = (read_runs(place), read_curves(place)) if place.is_dir() else ([], [])
    ended = {(run.comparison, run.variant, run.seed) for run in studied}
    curves = [curve for curve in curves if (curve.comparison, curve.variant, curve.seed) in ended]
    written += draw_study(studied, curves, place)
    found = tables([*runs, *studied]) | tables_over_examples(read_examples(folder)) | study_tables(studied, curves)
    for each, text in {each: with_tables(text, found) for each, text in pages.items()}.items():  # all, or none
        write_text_atomic(each, text)
    if own:
        names = {run.comparison for run in runs}
        typer.echo("\n".join(f"{name}\n\n{table}" for name, table in found.items() if name in names))
    for path in [*written, *chosen]:
        typer.echo(path)


if __name__ == "__main__":
    run_command(app)
