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
        int, typer.Option(min=0, help="Optimiser steps of the student's pre-training; 0: it is as random as the teacher.")
    ] = 600,
    seed: Annotated[int, typer.Option(min=0, help="Of the problems and of the models' random weights.")] = 0,
) -> None:
    """Make arithmetic problems with written-out solutions, a teacher of random weights and a pre-trained student.

    `pipelines/configs/evidence/arithmetic.yaml` starts from what this writes with its defaults.
    """
    from skd_lib.evidence.prepare import prepare as write
    from skd_lib.evidence.problems import ProblemSpace

    space = ProblemSpace(largest=largest)
    sizes = {"train": train, "validation": validation, "test": test}
    for path in write(folder, space=space, **sizes, pretraining=pretraining, seed=seed):
        typer.echo(path)
