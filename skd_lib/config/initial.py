"""Sections `teacher_sft` and `student_init`: what comes before distillation."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from skd_lib.config.section import Section
from skd_lib.config.training import (
    MULTINODE_HELP,
    MultinodeConfig,
    TeacherTrainingConfig,
    TrainingConfig,
    check_processes,
)


class TeacherSftConfig(Section):
    """Supervised fine-tuning of the teacher on the task."""

    enabled: bool = Field(True, description="False: the teacher is used as it is.")
    training: TeacherTrainingConfig = TeacherTrainingConfig()
    multinode: MultinodeConfig | None = Field(None, description=MULTINODE_HELP)

    @model_validator(mode="after")
    def _batch_divides(self) -> TeacherSftConfig:
        check_processes(self.multinode, self.training)
        return self


class StudentInitConfig(Section):
    """Where the student starts from."""

    mode: Literal["as_is", "sft", "prune"] = Field("as_is", description="`prune`: cut from the fine-tuned teacher.")
    keep_first: int | None = Field(None, ge=1, description="`prune`: keep this many of the teacher's first layers ...")
    keep_last: int | None = Field(None, ge=1, description="... and this many of its last ones.")
    training: TrainingConfig = Field(TrainingConfig(), description="`sft`: how.")

    @model_validator(mode="after")
    def _layers_for_prune(self) -> StudentInitConfig:
        given = self.keep_first is not None or self.keep_last is not None
        if self.mode == "prune" and (self.keep_first is None or self.keep_last is None):
            raise ValueError("mode `prune` needs both keep_first and keep_last")
        if self.mode != "prune" and given:
            raise ValueError(f"keep_first and keep_last belong to mode `prune`, not to `{self.mode}`")
        return self
