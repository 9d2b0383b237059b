"""The part of a run's configuration that one step reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field

from skd_lib._core.ascii_json import ascii_json
from skd_lib.config._base import ConfigSection
from skd_lib.config.data import DataConfig
from skd_lib.config.distill import DistillConfig
from skd_lib.config.evaluation import EvaluationConfig, RegistryConfig, SpecdecConfig
from skd_lib.config.models import StudentInitConfig, TeacherSftConfig, served_teacher
from skd_lib.config.parameters import short
from skd_lib.config.run import RunConfig
from skd_lib.config.task import TaskConfig


class StepConfig(ConfigSection):
    """A run's configuration without parts that the step does not depend on, and preflight's findings for it.

    It is the one parameter of a step: Kubeflow's cache takes the step's outputs from an earlier run where it, and the
    step's input artifacts, are the same. Fields that are left out have their defaults.

    - `fingerprint`: of the model or the data that the step fetches, as preflight found it; empty: any.
    - `fresh`: any text; with another one the step and its followers are not cached, see `skd_lib.preflight.reuse`.
    - `label`: tells this run of the step in MLflow from others of the same pipeline run.
    - `held_out`: whole task of each held-out set, by its name; for other sets the manifest of the data has it.
    - `drafts`: whether students are measured as drafts.
    """

    name: str = ""
    teacher: str = ""
    student: str = ""
    seed: int = Field(0, ge=0, lt=2**31)
    trust_remote_code: bool = False
    data: DataConfig | None = None
    task: TaskConfig = TaskConfig()
    held_out: dict[str, TaskConfig] = Field({})
    teacher_sft: TeacherSftConfig = TeacherSftConfig()
    student_init: StudentInitConfig = StudentInitConfig()
    distill: DistillConfig = DistillConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    specdec: SpecdecConfig = SpecdecConfig()
    registry: RegistryConfig = RegistryConfig()
    fingerprint: str = ""
    fresh: str = ""
    label: str = ""
    drafts: bool = True


DEPENDS: Mapping[str, tuple[str, ...]] = {
    "prepare_data": ("data", "seed", "fingerprint", "fresh"),
    "teacher_sft": ("teacher", "trust_remote_code", "teacher_sft", "task", "seed", "fingerprint", "fresh"),
    "student_init": ("student", "student_init", "task", "seed", "fingerprint", "label"),
    "distill": ("distill", "task", "seed", "label"),
    "evaluate_teacher": ("teacher", "trust_remote_code", "evaluation", "task", "held_out", "seed", "fingerprint"),
    "evaluate": ("evaluation", "task", "held_out", "seed", "label"),
    "specdec_benchmark": ("specdec", "task", "seed", "label", "drafts"),
    "evaluate_champion": ("evaluation", "specdec", "registry", "task", "seed"),
    "comet_score": ("evaluation", "task", "seed"),
    "report": ("name", "task", "registry"),
    "compare_variant": (*RunConfig.model_fields, "drafts"),
    "compare_table": ("name", "evaluation", "task", "seed"),
}
"""Step -> the fields of `StepConfig` that it depends on."""
OF_A_COMPARISON = ("compare_variant", "compare_table")
OF_BOTH = ("prepare_data", "teacher_sft", "evaluate_teacher")
"""Steps of comparisons and single runs that read a configuration from preflight."""
STEP_HELP = (
    "The run's settings that this step depends on, as JSON of the same shape as a run's file, with only what differs "
    "from the defaults"
)


def step_config(step: str, config: RunConfig, **found: Any) -> str:
    """Return option `--config` of a step (a key of `DEPENDS`), as JSON that arrives unchanged.

    `found` has further fields of `StepConfig`; those that the step does not depend on are left out.
    """
    values: dict[str, Any] = {**dict(config), "student": config.student or "", **found}
    if step != "comet_score":
        # COMET's settings go to its own step alone: if one changes, the models need not answer again.
        values["evaluation"] = config.evaluation.model_copy(update={"comet": EvaluationConfig().comet})
    if step == "prepare_data":
        values["data"] = config.data.without_tasks()
    if step in ("teacher_sft", "student_init", "distill", "specdec_benchmark"):
        values["task"] = config.task.without_judgement()
    elif step in ("evaluate_teacher", "evaluate"):
        values["task"] = config.task.without_comet()
        sets = config.data.held_out
        values["held_out"] = {each.name: config.task.with_fields_of(each.task).without_comet() for each in sets}
    depends = DEPENDS[step]
    if step == "teacher_sft" and served_teacher(config.teacher):
        depends = (*depends, "student")  # whose tokenizer the teacher's is
    return ascii_json(short(StepConfig(**{name: values[name] for name in depends if name in values})))
