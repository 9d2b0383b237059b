"""Sections `teacher_sft` and `student_init`: the models before distillation."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from skd_lib.config._base import ConfigSection
from skd_lib.config.training import (
    MULTINODE_HELP,
    MultinodeConfig,
    TeacherTrainingConfig,
    TrainingConfig,
    check_processes,
)

CUTTING = ("prune", "prune_sft")
"""The modes of `student_init` that cut the student from the teacher."""


class TeacherSftConfig(ConfigSection):
    """Supervised fine-tuning of the teacher on the task."""

    enabled: bool = Field(True, description="False: the teacher is used as it is.")
    training: TeacherTrainingConfig = TeacherTrainingConfig()
    multinode: MultinodeConfig | None = Field(None, description=MULTINODE_HELP)

    @model_validator(mode="after")
    def _batch_divides(self) -> TeacherSftConfig:
        check_processes(self.multinode, self.training)
        return self


class StudentInitConfig(ConfigSection):
    """The student before distillation."""

    mode: Literal["as_is", "sft", "prune", "prune_sft"] = Field(
        "as_is",
        description="`sft`: fine-tuned on its own examples; `prune`: cut from the fine-tuned teacher; `prune_sft`: "
        "cut, then fine-tuned.",
    )
    keep_first: int | None = Field(None, ge=1, description="Cutting: keep this many of the teacher's first layers ...")
    keep_last: int | None = Field(None, ge=1, description="... and this many of its last ones.")
    training: TrainingConfig = Field(TrainingConfig(), description="Fine-tuning: how.")

    @property
    def cuts(self) -> bool:
        """The student is cut from the teacher, instead of being a model of its own."""
        return self.mode in CUTTING

    @property
    def trains(self) -> bool:
        """The student is fine-tuned."""
        return self.mode in ("sft", "prune_sft")

    @model_validator(mode="after")
    def _layers_for_prune(self) -> StudentInitConfig:
        given = self.keep_first is not None or self.keep_last is not None
        if self.cuts and (self.keep_first is None or self.keep_last is None):
            raise ValueError(f"mode `{self.mode}` needs both keep_first and keep_last")
        if not self.cuts and given:
            raise ValueError(f"keep_first and keep_last belong to modes `prune` and `prune_sft`, not to `{self.mode}`")
        return self
