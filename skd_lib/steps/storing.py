"""The teacher's part of a training step, asked before it starts (`distill.teacher_signal.mode: stored`).

What it says is kept beside the checkpoints, under a key of all that it depends on: other runs with the same teacher,
data and settings find it there, and it is theirs to remove.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skd_lib.config import DistillConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from skd_lib.data.tokenize import TokenizedExample
    from skd_lib.training.stored_teacher import StoredSignals

_FOLDER = "teacher_signal"


def stored_signals(
    root: Path,
    teacher_digest: str,
    load_teacher: Callable[[], PreTrainedModel],
    student: PreTrainedModel,
    examples: Sequence[TokenizedExample],
    distill: DistillConfig,
    *,
    pad_id: int,
) -> StoredSignals:
    """What the teacher says along the examples' own responses.

    Args:
        root: Folder for checkpoints.
        teacher_digest: Of the teacher's weights.
        load_teacher: Called if nothing is stored yet.
        student: Whose vocabulary counts.
        examples: Training and validation examples.
        distill: Temperature and number of tokens.
        pad_id: Fills rows up.
    """
    from skd_lib.models.heads import vocabulary_size
    from skd_lib.training.stored_teacher import examples_digest, store_signals

    settings: dict[str, Any] = {
        "k": distill.teacher_signal.top_k,
        "temperature": distill.temperature,
        "vocabulary": vocabulary_size(student),
    }
    folder = _folder(root, teacher_digest, kind="signals", examples=examples_digest(examples), **settings)
    rows = distill.training.micro_batch_size or distill.training.batch_size
    return store_signals(folder, load_teacher, examples, rows=rows, pad_id=pad_id, **settings)


def stored_responses(
    root: Path,
    teacher_digest: str,
    load_teacher: Callable[[], PreTrainedModel],
    student: PreTrainedModel,
    examples: Sequence[TokenizedExample],
    distill: DistillConfig,
    *,
    seed: int,
    limits: dict[str, Any],
) -> list[TokenizedExample]:
    """The examples with the teacher's responses: one to each prompt, sampled as `distill.sampling.teacher` says.

    Args:
        root: Folder for checkpoints.
        teacher_digest: Of the teacher's weights.
        load_teacher: Called if nothing is stored yet.
        student: Whose vocabulary counts.
        examples: Training examples.
        distill: How the teacher samples.
        seed: Seed of the samples.
        limits: `eos_ids`, `pad_id` and `max_new_tokens`, as for `rollout_for`.
    """
    from skd_lib.models.heads import vocabulary_size
    from skd_lib.rollouts import Strategy, rollout_for
    from skd_lib.training.stored_teacher import examples_digest, store_responses

    def make_strategy() -> Strategy:
        teacher = load_teacher()
        return rollout_for("seqkd", student=student, teacher=teacher, distill=distill, steps=1, seed=seed, **limits)

    folder = _folder(
        root,
        teacher_digest,
        kind="responses",
        examples=examples_digest(examples),
        vocabulary=vocabulary_size(student),
        sampling=distill.sampling.teacher.model_dump(),
        seed=seed,
        **limits,
    )
    return store_responses(folder, make_strategy, examples, rows=distill.training.batch_size)


def _folder(root: Path, teacher_digest: str, **inputs: Any) -> Path:
    from skd_lib import __version__
    from skd_lib.training.checkpoints import checkpoint_dir

    return checkpoint_dir(root, _FOLDER, version=__version__, teacher=teacher_digest, **inputs)
