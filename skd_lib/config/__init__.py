"""The configuration of one run: one YAML file, validated before anything is loaded.

Sections of the file by module: `run` (the whole file), `data`, `task`, `models` (`teacher_sft`, `student_init`),
`distill`, `training` (`training` and `multinode` of other sections), and `evaluation` (with `specdec` and `registry`).
Besides them, `parameters` is the form of Kubeflow's page, `step` the part that one step reads, `fields` the list of all
fields for people, and `_base` and `_reading` are the machinery.
"""

from skd_lib._core.documents import parse_json
from skd_lib.config._base import ConfigSection, Count, Schedule, Section
from skd_lib.config._reading import Overrides, apply, parse_overrides, parse_section, read_yaml
from skd_lib.config.data import (
    Columns,
    DataConfig,
    DataSource,
    FilesSource,
    GettextSource,
    GettextWheel,
    HeldOutConfig,
    HeldOutFiles,
    HeldOutHub,
    HubDataset,
    HubSource,
)
from skd_lib.config.distill import (
    DistillConfig,
    DivergenceName,
    EnginePodsConfig,
    InterleavedConfig,
    MethodName,
    RuleName,
    SamplingParams,
)
from skd_lib.config.evaluation import EvaluationConfig, JudgeConfig, RegistryConfig, SpecdecConfig
from skd_lib.config.models import StudentInitConfig, TeacherSftConfig
from skd_lib.config.run import RunConfig, load_config, refuse_multinode
from skd_lib.config.task import LOWER_IS_BETTER, AnswerKind, MetricName, TaskConfig
from skd_lib.config.training import (
    DistillTrainingConfig,
    LoraConfig,
    MultinodeConfig,
    Precision,
    TeacherPrecision,
    TrainingConfig,
)
