"""Memory, precision and quantisation: estimates, and warnings where a machine has too little."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from skd_lib.config import RunConfig
from skd_lib.distillation.divergences import DIVERGENCES
from skd_lib.planning.assumptions import calibration_file, write_calibration
from skd_lib.planning.machines import load_machine
from skd_lib.planning.memory import Estimate, available_memory, config_size, estimates
from tests.conftest import CpuFlags
from tests.preflight.support import check, only


def test_a_models_size_is_that_of_the_model(models: tuple[Path, Path], tiny_model: Any) -> None:
    size = config_size(AutoConfig.from_pretrained(models[0]))
    assert size.parameters == sum(parameter.numel() for parameter in tiny_model(layers=4).parameters())
    assert (size.layers, size.hidden, size.vocabulary) == (4, 32, 320)
    assert size.cache == 2 * 2 * 8
    pruned = sum(parameter.numel() for parameter in tiny_model(layers=3).parameters())
    assert size.pruned(3).parameters == pytest.approx(pruned, rel=0.01)


def test_the_estimate_grows_with_what_costs_memory(values: dict[str, Any], models: tuple[Path, Path]) -> None:
    teacher, student = (config_size(AutoConfig.from_pretrained(path)) for path in models)

    def largest(**changes: Any) -> dict[str, Estimate]:
        config = RunConfig.model_validate(values | changes)
        return {found.step: found for found in estimates(config, teacher, student, device=torch.device("cpu"))}

    plain = largest()
    assert set(plain) == {"teacher_sft", "distill"}
    assert plain["teacher_sft"].parts["weights"] == 4 * teacher.parameters
    assert plain["teacher_sft"].parts["AdamW"] == 8 * teacher.parameters
    assert plain["teacher_sft"].parts["checkpoint"] == 12 * teacher.parameters
    assert plain["distill"].parts["teacher"] == 4 * teacher.parameters
    assert plain["distill"].total == sum(plain["distill"].parts.values())
    assert set(largest(teacher_sft={"enabled": False})) == {"distill"}
    assert "teacher" not in largest(distill={"method": "sft"})["distill"].parts
    supervised = largest(distill={"method": "supervised_kd"})["distill"]
    assert "caches" not in supervised.parts
    stored = largest(distill={"method": "supervised_kd", "teacher_signal": {"mode": "stored"}})["distill"]
    assert stored.total == supervised.total - supervised.parts["teacher"]
    caches = {method: largest(distill={"method": method})["distill"].parts["caches"] for method in ("seqkd", "imitkd")}
    assert sum(caches.values()) == plain["distill"].parts["caches"]  # one model's and the other's
    losses = {d: largest(distill={"divergence": d})["distill"].parts["loss"] for d in DIVERGENCES}
    assert losses["adaptive_kl"] > losses["jsd"] > losses["forward_kl"] > plain["teacher_sft"].parts["loss"]
    small = largest(distill={"training": {"micro_batch_size": 1}})["distill"]
    assert small.parts["activations"] * 8 == plain["distill"].parts["activations"]
    checkpointed = largest(distill={"training": {"gradient_checkpointing": True}})["distill"]
    assert checkpointed.total < plain["distill"].total
    adapted = largest(distill={"training": {"lora": {"rank": 2}}})["distill"].parts
    assert adapted["AdamW"] == 8 * 2 * student.adapted
    assert adapted["weights"] == 4 * student.parameters + 4 * 2 * student.adapted
    held = {
        precision: largest(distill={"training": {"teacher_precision": precision}})["distill"].parts["teacher"]
        for precision in ("auto", "fp32", "bf16", "8bit", "4bit")
    }
    assert held["auto"] == held["fp32"] == 2 * held["bf16"]
    layers = teacher.parameters - teacher.vocabulary * teacher.hidden
    assert held["fp32"] - held["8bit"] == 3 * layers
    assert held["8bit"] - held["4bit"] == layers // 2


def test_a_teacher_that_cannot_be_quantised_is_an_error(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    wanted = values | {"distill": {"training": {"teacher_precision": "8bit"}}}
    assert "teacher precision" not in [each.name for each in check(wanted, tmp_path).checks if each.level == "error"]
    wanted["distill"]["training"]["teacher_precision"] = "4bit"
    found = only(check(wanted, tmp_path), "error")
    assert (found.name, found.where) == ("teacher precision", "teacher_precision 4bit")
    assert "q_proj" in found.what
    assert "32 inputs, no multiple of the 64" in found.what
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")  # the training steps get nodes of their own
    assert "teacher precision" not in [each.name for each in check(wanted, tmp_path).checks if each.level == "error"]
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # as if it were not installed
    found = only(check(wanted, tmp_path), "error")
    assert (found.name, found.where) == ("teacher precision", "teacher_precision 4bit")
    assert "bitsandbytes" in found.what
    assert "bf16" in found.hint


def test_a_precision_that_is_slow_here_is_a_warning(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cpu_flags: CpuFlags
) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)

    def found(level: str) -> list[tuple[str, str]]:
        checks = check(values, tmp_path).checks
        return [(each.what, each.where) for each in checks if (each.name, each.level) == ("precision", level)]

    cpu_flags("avx512_bf16")
    assert found("ok") == [("`auto` is fp32 here", "")]
    values["distill"] = {"training": {"precision": "bf16"}}
    values["teacher_sft"] = {"training": {"precision": "fp32"}}
    ((what, where),) = found("warning")
    assert where == "distill.training.precision"
    assert "slower than fp32" in what
    cpu_flags("amx_bf16")
    assert found("warning") == []
    assert found("ok") == [("`auto` is bf16 here", "")]
    cpu_flags()
    del values["distill"]
    monkeypatch.setenv("SKD_PRECISION", "bf16")
    assert [where for _, where in found("warning")] == ["environment variable SKD_PRECISION"]
    monkeypatch.setenv("SKD_PRECISION", "half")
    ((what, where),) = found("error")
    assert (what, where) == ("must be fp32 or bf16, got 'half'", "environment variable SKD_PRECISION")


def test_too_little_memory_is_a_warning(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert available_memory()[0] > 0
    monkeypatch.setattr("skd_lib.preflight.environment.available_memory", lambda: (1000, "this machine"))
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    found = only(check(values, tmp_path), "warning")
    assert found.name == "memory"
    assert "micro_batch_size" in found.hint
    # In a cluster this machine's memory says nothing about the training steps'.
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    if not torch.cuda.is_available():
        assert all(found.level == "ok" for found in check(values, tmp_path).checks)


def test_the_report_says_what_the_run_takes_by_step(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    report = check(values, tmp_path)
    (found,) = [each for each in report.checks if each.name == "plan"]
    assert found.level == "ok"
    assert re.match(r"\w+: .*\$\d+\.\d\d.*; assumed: acceptance 0.8, ", found.what)
    assert "rows" not in found.what.partition("assumed:")[2]  # they were counted
    table = report.markdown().partition("## ")[2]
    steps = ("teacher_sft", "distill", "evaluate student", "specdec_benchmark", "all")
    assert [table.count(f"\n| {step} | ") for step in steps] == [1] * len(steps)
    # What was measured here is used.
    file = calibration_file(load_machine("cpu"))
    if torch.cuda.is_available():
        return
    write_calibration(file, load_machine("cpu"), RunConfig.model_validate(values), {"acceptance": 0.5})
    (found,) = [each for each in check(values, tmp_path).checks if each.name == "plan"]
    assert "acceptance 0.8" not in found.what
    file.write_text("{}")
    (found,) = [each for each in check(values, tmp_path).checks if each.name == "plan"]
    assert (found.level, found.where) == ("warning", str(file))  # a plan keeps no run from starting


def test_in_a_cluster_the_report_compares_machines(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if torch.cuda.is_available():
        pytest.skip("a pod with a GPU trains on it")
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    report = check(values, tmp_path)
    (found,) = [each for each in report.checks if each.name == "plan"]
    assert [name for name in ("l4: ", "a100: ", "h100x8: ") if name in found.what] == ["l4: ", "a100: ", "h100x8: "]
    assert "\n| step | l4 | a100 | h100x8 |" in report.markdown()
