"""The configuration of one run: one YAML file, validated before anything is loaded.

Every field is documented where it is defined, a module for each part of the file.
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
    HubDataset,
    HubSource,
)
from skd_lib.config.distill import (
    DistillConfig,
    DivergenceName,
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

__all__ = [
    "LOWER_IS_BETTER",
    "AnswerKind",
    "Columns",
    "ConfigSection",
    "Count",
    "DataConfig",
    "DataSource",
    "DistillConfig",
    "DistillTrainingConfig",
    "DivergenceName",
    "EvaluationConfig",
    "FilesSource",
    "GettextSource",
    "GettextWheel",
    "HeldOutConfig",
    "HeldOutFiles",
    "HubDataset",
    "HubSource",
    "InterleavedConfig",
    "JudgeConfig",
    "LoraConfig",
    "MethodName",
    "MetricName",
    "MultinodeConfig",
    "Overrides",
    "Precision",
    "RegistryConfig",
    "RuleName",
    "RunConfig",
    "SamplingParams",
    "Schedule",
    "Section",
    "SpecdecConfig",
    "StudentInitConfig",
    "TaskConfig",
    "TeacherPrecision",
    "TeacherSftConfig",
    "TrainingConfig",
    "apply",
    "load_config",
    "parse_json",
    "parse_overrides",
    "parse_section",
    "read_yaml",
    "refuse_multinode",
]
