"""CONTRIBUTING's recipes: a method, a rule and a divergence from outside are trained with, and described."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from skd_lib._core.registry import Registry
from skd_lib.config import DistillConfig, RunConfig, TaskConfig, TrainingConfig
from skd_lib.config.fields import list_fields
from skd_lib.distillation.divergences import DIVERGENCES
from skd_lib.distillation.loss import loss_for
from skd_lib.distillation.methods import METHODS, unread_settings
from skd_lib.errors import SkdError
from skd_lib.planning.memory import estimate, skeleton_size
from skd_lib.sampling.acceptance import RULES
from tests.training.tiny_task import run

ROOT = Path(__file__).parents[2]
REGISTRIES: dict[str, tuple[Registry, str, str]] = {  # type: ignore[type-arg]
    "method": (METHODS, "methods", "skd_every_second"),
    "sampling.rule": (RULES, "rules", "agreement"),
    "divergence": (DIVERGENCES, "divergences", "hellinger"),
}
CONFIG = {"method": "skd_every_second", "divergence": "hellinger", "sampling": {"rule": "agreement"}}


@pytest.fixture
def recipes() -> Iterator[None]:
    before = {path: dict(registry) for path, (registry, _, _) in REGISTRIES.items()}
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    try:
        for block in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL):
            exec(block, {})  # noqa: S102 - the page's own code
        yield
    finally:
        for path, (registry, _, _) in REGISTRIES.items():
            registry.clear()
            registry.update(before[path])


@pytest.mark.usefixtures("recipes")
def test_a_training_with_them(tiny_model: Callable[..., PreTrainedModel], tmp_path: Path) -> None:
    student, teacher = tiny_model(seed=1), tiny_model(seed=2)
    figures: list[dict[str, float]] = []
    run(
        student,
        teacher,
        tmp_path,
        method=CONFIG["method"],
        distill=DistillConfig.model_validate(CONFIG).model_dump(exclude={"training"}),
        on_metrics=lambda step, values: figures.append(values),
        max_steps=2,
        eval_steps=2,
    )
    steps = [values for values in figures if "loss" in values]
    assert [values.get("replacements_per_sequence", 0) > 0 for values in steps] == [True, False]
    assert all(0 < values["loss"] < 1 for values in steps)  # as the squared Hellinger distance


@pytest.mark.usefixtures("recipes")
@pytest.mark.parametrize("path", REGISTRIES)
def test_help_docs_and_schema_have_them(path: str) -> None:
    registry, table, name = REGISTRIES[path]
    (field,) = (field for field in list_fields(RunConfig) if field.path == f"distill.{path}")
    assert name in field.type.split(" | ")
    assert f"`{name}`: {registry[name]}." in field.description
    assert f'"{name}"' in str(RunConfig.model_json_schema()).replace("'", '"')
    assert f"| `{name}` | " in runpy.run_path(str(ROOT / "docs/tables.py"))["tables"]()[table]


@pytest.mark.usefixtures("recipes")
def test_checks_and_estimates_know_them(tiny_model: Callable[..., PreTrainedModel]) -> None:
    config = DistillConfig.model_validate(CONFIG | {"beta": 0.1, "replaced_weight": 1.0})
    assert unread_settings(config) == ["beta"]
    size = skeleton_size(tiny_model())
    model = {"student": size, "teacher": size, "task": TaskConfig(), "training": TrainingConfig()}
    cpu = torch.device("cpu")
    new, known = (
        estimate("distill", "skd_every_second", **model, divergence=name, device=cpu)  # type: ignore[arg-type]
        for name in ("hellinger", "adaptive_kl")
    )
    assert new.parts["loss"] == known.parts["loss"]  # unmeasured: as much as any
    assert loss_for(config).divergence(torch.zeros(1, 1), torch.zeros(1, 1)).item() == 0


def test_names_are_taken_once_and_others_are_refused() -> None:
    with pytest.raises(SkdError, match="there is a method `skd` already"):
        METHODS.add("skd", METHODS["skd"])
    with pytest.raises(ValueError, match=r"unknown acceptance rule 'agreement': one of `top_k`"):
        DistillConfig.model_validate(CONFIG)
    with pytest.raises(SkdError, match="did you mean `seqkd`"):
        METHODS["seq_kd"]


@pytest.mark.parametrize(
    "module", ["distillation.methods", "distillation.divergences", "sampling.acceptance", "config"]
)
def test_each_is_imported_first_and_without_torch(module: str) -> None:
    code = f"import skd_lib.{module}, sys; from skd_lib.config import DistillConfig; DistillConfig(method='seqkd')"
    subprocess.run([sys.executable, "-c", f"{code}; assert 'torch' not in sys.modules"], check=True)
