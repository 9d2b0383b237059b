"""Which precision `auto` is, and that every part of a run asks the same question."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from skd_lib.config import DistillConfig, Precision, TaskConfig, TrainingConfig
from skd_lib.errors import SkdError
from skd_lib.evaluation.generate import load_for_inference
from skd_lib.models.precision import precision_trouble, resolve_precision
from skd_lib.planning.memory import config_size, estimate
from skd_lib.preflight.checks import Checks
from skd_lib.preflight.environment import check_auto_precision
from skd_lib.steps import trained_model
from skd_lib.steps.training_run import TrainingRun
from tests.conftest import CpuFlags, SaveTinyModel, TinyModel

CPU, GPU = torch.device("cpu"), torch.device("cuda")
FLAGS = pytest.mark.parametrize(
    ("flags", "expected"),
    [([], "fp32"), (["avx512_bf16"], "fp32"), (["avx512_bf16", "amx_bf16"], "bf16")],
    ids=["none", "avx512", "amx"],
)


@FLAGS
def test_auto_on_a_cpu(flags: list[str], expected: str, cpu_flags: CpuFlags) -> None:
    cpu_flags(*flags)
    assert resolve_precision("auto", CPU) == expected
    assert resolve_precision("fp32", CPU) == "fp32"
    assert resolve_precision("bf16", CPU) == "bf16"
    assert precision_trouble("auto", CPU) == precision_trouble("fp32", CPU) == ""
    assert bool(precision_trouble("bf16", CPU)) == (expected == "fp32")


def test_an_older_pytorch_knows_nothing_of_the_cpu(cpu_flags: CpuFlags, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu_flags("amx_bf16")
    monkeypatch.delattr("torch.cpu.get_capabilities")
    assert resolve_precision("auto", CPU) == "fp32"


@pytest.mark.parametrize(("native", "emulated"), [(True, True), (False, True), (False, False)])
def test_a_gpu_is_asked_without_emulation(
    native: bool, emulated: bool, cpu_flags: CpuFlags, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpu_flags("amx_bf16")  # says nothing about the GPU
    monkeypatch.setattr("torch.cuda.get_device_name", lambda _: "Tesla T4")
    monkeypatch.setattr(
        "torch.cuda.is_bf16_supported", lambda including_emulation=True: emulated if including_emulation else native
    )
    assert resolve_precision("auto", GPU) == ("bf16" if native else "fp32")
    if emulated:
        assert ("Tesla T4" in precision_trouble("bf16", GPU)) == (not native)
    else:
        with pytest.raises(SkdError, match="precision bf16: Tesla T4 cannot compute in bf16"):
            resolve_precision("bf16", GPU)


def test_a_variable_says_what_auto_is(cpu_flags: CpuFlags, monkeypatch: pytest.MonkeyPatch) -> None:
    for flags, pinned in (("amx_bf16", "fp32"), ("avx512_bf16", "bf16")):
        cpu_flags(flags)
        monkeypatch.setenv("SKD_PRECISION", pinned)
        assert resolve_precision("auto", CPU) == pinned
        assert resolve_precision("bf16", CPU) == "bf16"
        assert resolve_precision("fp32", CPU) == "fp32"
    monkeypatch.setenv("SKD_PRECISION", "")
    assert resolve_precision("auto", CPU) == "fp32"
    for wrong in ("auto", "BF16", "float32"):
        monkeypatch.setenv("SKD_PRECISION", wrong)
        with pytest.raises(SkdError, match=f"SKD_PRECISION: must be fp32 or bf16, got '{wrong}'"):
            resolve_precision("auto", CPU)


@FLAGS
def test_all_parts_of_a_run_decide_alike(
    flags: list[str], expected: str, cpu_flags: CpuFlags, save_tiny_model: SaveTinyModel, tmp_path: Path
) -> None:
    cpu_flags(*flags)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[expected]
    folder = save_tiny_model(tmp_path / "model")
    assert load_for_inference(folder)[0].dtype == dtype
    assert trained_model.load_frozen(folder).dtype == dtype
    assert trained_model.load_frozen(folder, "fp32").dtype == torch.float32
    assert trained_model.load_frozen(folder, computing="bf16").dtype == torch.bfloat16
    assert trained_model.load_trainable(folder).dtype == torch.float32
    checks = Checks()
    assert check_auto_precision(checks) == expected
    assert [check.what for check in checks.found] == [f"`auto` is {expected} here"]


@pytest.mark.parametrize("precision", ["auto", "fp32", "bf16"])
def test_memory_is_estimated_for_the_precision_of_the_training(
    precision: Precision, tiny_model: TinyModel, cpu_flags: CpuFlags
) -> None:
    size = config_size(tiny_model().config)

    def parts(precision: Precision) -> dict[str, int]:
        training = DistillConfig.model_validate({"training": {"precision": precision}}).training
        return estimate("distill", "skd", training, TaskConfig(), size, size, device=CPU).parts

    cpu_flags("amx_bf16")
    half, whole = parts(precision), parts("fp32")
    factor = 1 if precision == "fp32" else 2
    for part in ("activations", "caches", "teacher"):
        assert factor * half[part] == whole[part], part
    assert half["weights"] == whole["weights"]
    cpu_flags("avx512_bf16")
    assert parts("auto") == whole


def test_other_precision_is_other_work(cpu_flags: CpuFlags, tmp_path: Path) -> None:
    def key(precision: Precision = "auto") -> Path:
        options: dict[str, Any] = {"step": "teacher_sft", "method": "sft", "split": "train_teacher", "seed": 0}
        training = TrainingConfig(precision=precision)
        training_run = TrainingRun(
            **options,
            training=training,
            distill=None,
            task=TaskConfig(),
            checkpoint_root=str(tmp_path),
            models={},
            weights={},
        )
        return training_run.checkpoints({}, {}).folder

    cpu_flags("avx512_bf16")
    here = key()
    cpu_flags()
    assert key() == here
    cpu_flags("amx_bf16")
    assert key() != here
