"""Make the inputs of the controlled experiment: problems in files, an untrained teacher, a pre-trained student."""

from __future__ import annotations

from pathlib import Path

from problems import ProblemSpace, distinct
from skd_lib.data.examples import make_example, write_jsonl
from skd_lib.errors import SkdError

CONTEXT = 64
"""Tokens that the models can see; the longest problem and its solution have fewer than 50."""


def prepare(
    folder: Path, *, space: ProblemSpace, train: int, validation: int, test: int, pretraining: int, seed: int
) -> list[Path]:
    """Write `train.jsonl`, `validation.jsonl`, `test.jsonl`, `teacher/` and `student/`.

    No problem is in two of the files. Everything follows from the seed: written again, it is the same.

    Args:
        folder: Where to; what is there under these names is replaced.
        space: What problems look like.
        train: Training problems, from which a run takes the teacher's and the student's.
        validation: Problems for choosing checkpoints.
        test: Problems for the scores.
        pretraining: Optimiser steps that the student is pre-trained for; 0 leaves it as random as the teacher.
        seed: Of the problems and of the models' weights.

    Returns:
        What was written.

    Raises:
        SkdError: there are not so many problems, or the folder cannot be written.
    """
    from pretraining import pretrain
    from skd_lib.models.loading import save_model
    from tiny_models import SIZES, random_model, tokenizer_for

    counts = {"test": test, "validation": validation, "train": train}
    problems = distinct(space, sum(counts.values()), seed)
    written = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        start = 0
        for split, count in counts.items():
            written.append(folder / f"{split}.jsonl")
            rows = problems[start : start + count]
            write_jsonl(written[-1], (make_example(source, target, split) for source, target in rows))
            start += count
        tokenizer = tokenizer_for(space, CONTEXT)
        for number, (name, size) in enumerate(SIZES.items()):
            written.append(folder / name)
            model = random_model(size, tokenizer, CONTEXT, seed + number)
            if name == "student" and pretraining:
                pretrain(model, tokenizer, space, steps=pretraining, seed=seed + len(SIZES))
            save_model(model, tokenizer, written[-1])
    except OSError as error:
        raise SkdError(f"cannot be written: {error.strerror}", where=str(folder), hint="name another folder") from error
    return written
