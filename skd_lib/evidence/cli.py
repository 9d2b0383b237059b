"""`skd evidence`: the controlled experiment of docs/evidence.md, from the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

# Nothing heavy at the top: `skd --help` has to answer at once.

evidence = typer.Typer(
    help="The controlled experiment of docs/evidence.md: its data and models, its plots and tables.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)


@evidence.command()
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

    `pipelines/configs/evidence/arithmetic.yaml` starts from what this writes with its defaults.
    """
    import logging

    from skd_lib.evidence.prepare import prepare as write
    from skd_lib.evidence.problems import ProblemSpace

    logging.basicConfig(level=logging.INFO, format="%(message)s")  # minutes of pre-training
    space = ProblemSpace(largest=largest)
    sizes = {"train": train, "validation": validation, "test": test}
    for path in write(folder, space=space, **sizes, pretraining=pretraining, seed=seed):
        typer.echo(path)


@evidence.command()
def collect(
    comparisons: Annotated[list[Path], typer.Argument(help="Folders of `skd compare`, e.g. runs/evidence-methods.")],
    folder: Annotated[Path, typer.Option("--out", help="Where runs.csv and curves.csv go.")] = Path("docs/evidence"),
) -> None:
    """Put the runs of comparisons into two CSV files. Other comparisons that these hold stay."""
    from skd_lib.evidence.records import collect as write

    for path in write([each / "comparison.json" for each in comparisons], folder):
        typer.echo(path)


@evidence.command()
def plot(
    folder: Annotated[Path, typer.Argument(help="Where runs.csv and curves.csv are, and plots go.")] = Path(
        "docs/evidence"
    ),
    page: Annotated[Path, typer.Option(help="Page whose tables are written again.")] = Path("docs/evidence.md"),
) -> None:
    """Draw the plots and write the tables of a page from `runs.csv` and `curves.csv`."""
    from skd_lib.evidence.plots import draw
    from skd_lib.evidence.records import read_curves, read_runs
    from skd_lib.evidence.tables import with_tables
    from skd_lib.storage import write_text_atomic

    runs, curves = read_runs(folder), read_curves(folder)
    for path in draw(runs, curves, folder):
        typer.echo(path)
    write_text_atomic(page, with_tables(page.read_text(encoding="utf-8"), runs))
    typer.echo(page)
