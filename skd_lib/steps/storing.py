"""The teacher's part of a training step, asked before it starts (`distill.teacher_signal.mode: stored`).

What it says is kept beside the checkpoints, under a key of all that it depends on: other runs with the same teacher,
data and settings find it there, and it is theirs to remove.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skd_lib.config import DistillConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from skd_lib.data.tokenize import TokenizedExample
    from skd_lib.models.precision import Resolved
    from skd_lib.training.stored_teacher import StoredSignals

_FOLDER = "teacher_signal"


@dataclass(frozen=True)
class EarlyTeacher:
    """A teacher that is asked before the training, unless what it says is stored.

    Attributes:
        root: Folder for checkpoints.
        digest: Of the teacher's weights and settings.
        load: Makes the teacher.
        student: Whose vocabulary counts.
        distill: How the teacher samples, and what is stored of it.
        precision: In which the training computes, and the teacher unless its own is given.
    """

    root: Path
    digest: str
    load: Callable[[], PreTrainedModel]
    student: PreTrainedModel
    distill: DistillConfig
    precision: Resolved

    def signals(self, examples: Sequence[TokenizedExample], *, pad_id: int) -> StoredSignals:
        """What it says along the examples' own responses."""
        from skd_lib.training.stored_teacher import examples_digest, store_signals

        settings: dict[str, Any] = {
            "k": self.distill.teacher_signal.top_k,
            "temperature": self.distill.temperature,
            "vocabulary": self._vocabulary,
        }
        folder = self._folder(kind="signals", examples=examples_digest(examples), **settings)
        rows = self.distill.training.micro_batch_size or self.distill.training.batch_size
        return store_signals(folder, self.load, examples, rows=rows, pad_id=pad_id, **settings)

    def responses(
        self, examples: Sequence[TokenizedExample], *, seed: int, limits: dict[str, Any]
    ) -> list[TokenizedExample]:
        """The examples with its responses, one to each prompt, sampled as `distill.sampling.teacher` says.

        Args:
            examples: Whose prompts.
            seed: Seed of the samples.
            limits: `eos_ids`, `pad_id` and `max_new_tokens`, as for `rollout_for`.
        """
        from skd_lib.distillation.rollouts import Strategy, rollout_for
        from skd_lib.training.stored_teacher import examples_digest, store_responses

        def make_strategy() -> Strategy:
            models = {"student": self.student, "teacher": self.load()}
            return rollout_for("seqkd", **models, distill=self.distill, steps=1, seed=seed, **limits)

        folder = self._folder(
            kind="responses",
            examples=examples_digest(examples),
            vocabulary=self._vocabulary,
            sampling=self.distill.sampling.teacher.model_dump(),
            seed=seed,
            **limits,
        )
        return store_responses(folder, make_strategy, examples, rows=self.distill.training.batch_size)

    @property
    def _vocabulary(self) -> int:
        from skd_lib.models.heads import vocabulary_size

        return vocabulary_size(self.student)

    def _folder(self, **inputs: Any) -> Path:
        from skd_lib import __version__
        from skd_lib.training.checkpoints import checkpoint_key

        # Of the teacher's weights, and of what is computed with them.
        precision = [self.distill.training.teacher_precision, self.precision]
        return self.root / checkpoint_key(
            _FOLDER, version=__version__, teacher=self.digest, precision=precision, **inputs
        )
