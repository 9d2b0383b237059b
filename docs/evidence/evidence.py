"""The controlled experiment of docs/evidence.md: its data and models, its plots and tables.

    python docs/evidence/evidence.py --help

Run it at the root of the source tree, with the Python of `make install`.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import typer

from page import with_tables
from plots import draw
from prepare import prepare as write_start
from problems import ProblemSpace
from records import collect as write_records
from records import read_curves, read_runs
from skd_lib._core.terminal import run_command
from skd_lib.storage import write_text_atomic

FOLDER = Path("docs/evidence")

app = typer.Typer(
    help="The controlled experiment of docs/evidence.md: its data and models, its plots and tables.",
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
    folder: Annotated[Path, typer.Option("--out", help="Where runs.csv and curves.csv go.")] = FOLDER,
) -> None:
    """Put the runs of comparisons into two CSV files. Other comparisons that these hold stay."""
    for path in write_records([each / "comparison.json" for each in comparisons], folder):
        typer.echo(path)


@app.command()
def plot(
    folder: Annotated[Path, typer.Argument(help="Where runs.csv and curves.csv are, and plots go.")] = FOLDER,
    page: Annotated[Path, typer.Option(help="Page whose tables are written again.")] = Path("docs/evidence.md"),
) -> None:
    """Draw the plots and write the tables of a page from `runs.csv` and `curves.csv`."""
    runs, curves = read_runs(folder), read_curves(folder)
    for path in draw(runs, curves, folder):
        typer.echo(path)
    write_text_atomic(page, with_tables(page.read_text(encoding="utf-8"), runs))
    typer.echo(page)


if __name__ == "__main__":
    run_command(app)
