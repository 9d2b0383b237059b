"""The student before the experiment: it has learnt to write solutions, but not all of the facts that they need.

Students in the paper are instruction-tuned models that know a little of everything. This one has seen problems of
another kind than the task's: small addends only. So it copies, writes the form and counts up by a little, and fails
where a problem has a larger addend.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from problems import ProblemSpace, distinct
from skd_lib.config import TaskConfig, TrainingConfig
from skd_lib.data.examples import make_example

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from skd_lib.training.run import TrainResult

TASK = TaskConfig(
    prompt="{source}\n",
    chat_template=False,
    answer="hash",
    metrics=["accuracy"],
    max_prompt_tokens=16,
    max_new_tokens=40,
)
"""Prompt of a problem; `docs/evidence/configs/arithmetic.yaml` has the same."""
PROBLEMS, VALIDATION = 12_000, 100
SMALL_ADDENDS = (1, 6)
BATCH = 32


def pretrain(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, space: ProblemSpace, *, steps: int, seed: int
) -> TrainResult:
    """Train a model in place on problems with small addends.

    Args:
        model: In fp32.
        tokenizer: Its own.
        space: What the task's problems look like.
        steps: Optimiser steps of `BATCH` problems.
        seed: Of the problems and their order.

    Raises:
        SkdError: there are too few problems.
    """
    from skd_lib.data.tokenize import encode_all
    from skd_lib.training.checkpoints import Checkpoints
    from skd_lib.training.run import train

    problems = distinct(space.with_addends(SMALL_ADDENDS), PROBLEMS + VALIDATION, seed)
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    examples = encode_all(tokenizer, TASK, (make_example(*problem) for problem in problems), eos)
    with tempfile.TemporaryDirectory() as folder:
        return train(
            method="sft",
            student=model,
            teacher=None,
            train=examples[VALIDATION:],
            validation=examples[:VALIDATION],
            training=TrainingConfig(
                learning_rate=4e-3,
                lr_scheduler="cosine",
                max_steps=steps,
                batch_size=BATCH,
                eval_steps=max(steps // 5, 1),
                dropout=0,
            ),
            seed=seed,
            max_new_tokens=TASK.max_new_tokens,
            eos_ids=(eos,),
            pad_id=pad,
            checkpoints=Checkpoints(Path(folder)),
            name="pre-training",
        )
