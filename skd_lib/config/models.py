"""The teacher on a server, and sections `teacher_sft` and `student_init`: the models before distillation."""

from __future__ import annotations

from typing import Annotated, Any, Literal
from urllib.parse import parse_qs, urlsplit

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError, field_validator, model_validator

from skd_lib.config._base import ConfigSection
from skd_lib.config.names import check_line, check_url
from skd_lib.config.training import (
    MULTINODE_HELP,
    MultinodeConfig,
    TeacherTrainingConfig,
    TrainingConfig,
    check_processes,
)

CUTTING = ("prune", "prune_sft")
"""The modes of `student_init` that cut the student from the teacher."""


TEACHER_KEY = "SKD_TEACHER_API_KEY"


class ServedTeacher(ConfigSection):
    """A teacher behind an OpenAI-compatible API. As a text it is `URL#MODEL`, or `URL?key_env=VARIABLE#MODEL`."""

    url: str = Field(description="Base URL of the API, e.g. `http://vllm:8000/v1`.")
    model: Annotated[str, AfterValidator(check_line)] = Field(description="Name by which the API knows the model.")
    key_env: str = Field(
        TEACHER_KEY, pattern=r"^[A-Za-z_][A-Za-z0-9_]*$", description="Environment variable that holds the API's key."
    )

    @field_validator("url")
    @classmethod
    def _is_a_base(cls, url: str) -> str:
        if urlsplit(url).query or urlsplit(url).fragment:
            raise ValueError("must be the API's base alone, without ? and #")
        return check_url(url, TEACHER_KEY)

    def __str__(self) -> str:
        other = f"?key_env={self.key_env}" if self.key_env != TEACHER_KEY else ""
        return f"{self.url}{other}#{self.model}"


def served_teacher(reference: str) -> ServedTeacher | None:
    """Return the teacher that a reference names, if that is one on a server; raise ValueError if it has a mistake."""
    if not reference.startswith(("http://", "https://")):
        return None
    base, _, model = reference.partition("#")
    url, _, query = base.partition("?")
    values = {name: found[-1] for name, found in parse_qs(query, keep_blank_values=True).items()}
    return ServedTeacher.model_validate({"url": url, "model": model, **values})


def _reference(value: Any) -> Any:
    """Return a served teacher as a text; anything else unchanged."""
    try:
        if isinstance(value, dict):
            return str(ServedTeacher.model_validate(value))
        return str(served_teacher(value) or value) if isinstance(value, str) else value
    except ValidationError as error:
        found = [
            f"{'.'.join(map(str, each['loc'])) or 'teacher'}: {each['msg'].removeprefix('Value error, ')}"
            for each in error.errors()
        ]
        raise ValueError("; ".join(found)) from error


TeacherReference = Annotated[str, BeforeValidator(_reference, json_schema_input_type=str | ServedTeacher)]
"""A model's reference, or a `ServedTeacher`."""


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
