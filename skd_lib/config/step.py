"""What one step reads of a run's configuration."""

from __future__ import annotations

from pydantic import Field

from skd_lib.config._base import ConfigSection
from skd_lib.config.data import DataConfig
from skd_lib.config.distill import DistillConfig
from skd_lib.config.evaluation import EvaluationConfig, RegistryConfig, SpecdecConfig
from skd_lib.config.models import StudentInitConfig, TeacherSftConfig
from skd_lib.config.task import TaskConfig


class StepConfig(ConfigSection):
    """A run's configuration without what the step does not depend on, and what preflight found for it.

    It is the one parameter of a step: Kubeflow's cache takes the step's outputs from an earlier run where it, and the
    step's input artifacts, are the same. What is left out has its default.

    Attributes:
        fingerprint: Of the model or the data that the step fetches, as preflight found it; empty: whatever is there.
        fresh: Any text. With another one the step, and what depends on it, is not taken from the cache; see
            `skd_lib.preflight.reuse`.
        label: Tells this run of the step in MLflow from others of the same pipeline run.
        held_out: Whole task of each held-out set, by the set's name; for a set that is not there the manifest of the
            data says it.
        drafts: Whether students are measured as drafts.
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


STEP_HELP = (
    "The run's settings that this step depends on, as JSON of the same shape as a run's file, with only what differs "
    "from the defaults"
)
