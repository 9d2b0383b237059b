"""Preflight: a good run passes, all that is wrong with a bad one is found in one go; both steps write their outputs."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from rich.console import Console
from transformers import AutoConfig, AutoTokenizer

from skd_kfp.pipelines.local.folder import RunFolder
from skd_lib._core import events
from skd_lib._core.ascii_json import ascii_json
from skd_lib.config import DistillConfig, DivergenceName, Method, RunConfig, parse_section
from skd_lib.config.parameters import Form, to_parameters
from skd_lib.config.step import StepConfig
from skd_lib.data.examples import make_example
from skd_lib.data.prepared import PreparedData
from skd_lib.distillation.methods import reads_setting, unread_settings
from skd_lib.errors import SkdError, SkdErrors
from skd_lib.models.fingerprint import short
from skd_lib.models.references import model_fingerprint
from skd_lib.preflight import Check, PreflightReport, dates, run_checks
from skd_lib.preflight import data as preflight_data
from skd_lib.preflight.checks import Checks
from skd_lib.preflight.memory import Estimate, available_memory, config_size, estimates
from skd_lib.preflight.models import Model, check_model
from skd_lib.steps import preflight, prepare_data
from skd_lib.steps.runtime import Switch
from tests.conftest import CpuFlags, SaveTinyModel
from tests.multinode.fake_kubernetes import running
from tests.support.gcs_emulator import emulated

ROWS = [{"source": f"le fichier {i} et {i * i}", "target": f"the file {i} and {i * i}"} for i in range(40)]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, save_tiny_model: SaveTinyModel) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("models")
    return save_tiny_model(root / "teacher", layers=4), save_tiny_model(root / "student", layers=2)


@pytest.fixture
def values(tmp_path: Path, models: tuple[Path, Path]) -> dict[str, Any]:
    """A good configuration."""
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    return {
        "name": "tiny",
        "teacher": str(models[0]),
        "student": str(models[1]),
        "data": {"source": {"type": "files", "train": [str(data)]}},
        "task": {"prompt": "translate: {source}", "max_prompt_tokens": 96, "max_new_tokens": 64},
    }


def check(values: dict[str, Any], tmp_path: Path, **options: Any) -> PreflightReport:
    options = {"checkpoint_root": str(tmp_path / "checkpoints"), "tracking_uri": "", **options}
    return run_checks(RunConfig.model_validate(values), **options)


def only(report: PreflightReport, level: str) -> Check:
    (found,) = [found for found in report.checks if found.level == level]
    return found


def without_template(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = None
    (folder / "chat_template.jinja").unlink()
    tokenizer.save_pretrained(folder)


def test_a_good_run_passes(values: dict[str, Any], tmp_path: Path) -> None:
    report = check(values, tmp_path, pipeline_root=str(tmp_path / "artifacts"))
    assert [found for found in report.checks if found.level != "ok"] == []
    report.raise_errors()
    assert len(report.data_fingerprint) == 64
    found = {found.name: found.what for found in report.checks}
    assert found["data"] == "rows: train 32, validation 4, test 4"
    assert found["distill"] == "12 optimiser steps of 8 on 32 examples"
    assert all(found[role].endswith(short(model_fingerprint(values[role]))) for role in ("teacher", "student"))
    assert "0 have prompts over 96 tokens" in found["train lengths"]
    assert {"teacher", "student", "tokenizers", "checkpoints", "artifacts", "tracking", "GPU", "memory"} <= set(found)


def test_a_run_can_do_without_comet(values: dict[str, Any], tmp_path: Path) -> None:
    assert "comet" not in {found.name for found in check(values, tmp_path).checks}
    model = tmp_path / "comet"
    model.mkdir()
    (model / "hparams.yaml").write_text("{class_identifier: regression_metric, pretrained_model: x}", encoding="utf-8")
    values |= {"task": {**values.get("task", {}), "metrics": ["chrf", "comet"]}}
    good = check(values | {"evaluation": {"comet": {"model": str(model)}}}, tmp_path)
    assert [found.level for found in good.checks if found.name == "comet"] == ["ok"]
    found = only(check(values | {"evaluation": {"comet": {"model": "nobody/no-such-model"}}}, tmp_path), "warning")
    assert (found.name, found.where) == ("comet", "nobody/no-such-model")
    assert found.what.startswith("no scores by COMET: cannot reach")


def test_the_report_is_shown_as_table_and_as_markdown() -> None:
    report = PreflightReport([Check("data", "error", "a | b\n[bold]c", where="rows.jsonl, row 3", hint="mend it")])
    console = Console(width=100, file=StringIO())
    console.print(report.table())
    shown = console.file.getvalue()
    assert "✗" in shown
    assert "rows.jsonl, row 3: a | b" in shown
    assert "[bold]c" in shown
    assert report.markdown().splitlines()[-1] == "| ✗ | data | rows.jsonl, row 3: a \\| b<br>[bold]c | mend it |"


def test_everything_wrong_is_found_at_once(values: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "rows.jsonl").write_text('{"source": "a", "target": "b"}\n{"source": "a"}\n{\n', encoding="utf-8")
    values |= {"teacher": "nobody/no-such-model", "student": str(tmp_path)}
    report = check(
        values,
        tmp_path,
        checkpoint_root=str(tmp_path / "file" / "checkpoints"),
        pipeline_root="gs://",
        tracking_uri="file:./mlruns",
    )
    errors = {(found.name, found.where) for found in report.checks if found.level == "error"}
    assert errors == {
        ("teacher", "nobody/no-such-model"),
        ("student", str(tmp_path)),
        ("data", f"{tmp_path / 'rows.jsonl'}, row 2, field `target`"),
        ("data", f"{tmp_path / 'rows.jsonl'}, row 3"),
        ("checkpoints", str(tmp_path / "file" / "checkpoints")),
        ("artifacts", "gs://"),
        ("tracking", "tracking URI `file:./mlruns`"),
    }
    assert all(found.hint for found in report.checks if found.level == "error")
    assert report.data_fingerprint == ""
    assert not report.tracking_works
    with pytest.raises(Exception, match="7 problems found"):
        report.raise_errors()


def test_models_with_different_tokenizers_are_refused(
    values: dict[str, Any], tmp_path: Path, save_tiny_model: SaveTinyModel
) -> None:
    student = save_tiny_model(tmp_path / "student")
    tokenizer = json.loads((student / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (student / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    found = only(check(values | {"student": str(student)}, tmp_path), "error")
    assert found.name == "tokenizers"
    assert "'a'" in found.what


def test_padded_vocabularies_of_different_size_are_fine(
    values: dict[str, Any], tmp_path: Path, save_tiny_model: SaveTinyModel
) -> None:
    student = save_tiny_model(tmp_path / "student", vocab_size=384)
    assert check(values | {"student": str(student)}, tmp_path).errors() == []


def test_a_prompt_and_an_answer_must_fit_into_both_contexts(
    values: dict[str, Any], tmp_path: Path, save_tiny_model: SaveTinyModel
) -> None:
    student = save_tiny_model(tmp_path / "student", max_position_embeddings=128)
    found = only(check(values | {"student": str(student)}, tmp_path), "error")
    assert "max_prompt_tokens 96 + max_new_tokens 64 exceed the student's context of 128" in found.what


def test_a_missing_chat_template_is_told_once_for_each_model(
    values: dict[str, Any], tmp_path: Path, save_tiny_model: SaveTinyModel
) -> None:
    student = save_tiny_model(tmp_path / "student")
    without_template(student)
    values |= {"student": str(student)}
    found = only(check(values, tmp_path), "error")
    assert (found.name, found.what) == ("student", "the tokenizer has no chat template")
    values["task"] |= {"chat_template": False}
    assert check(values, tmp_path).errors() == []


@pytest.mark.parametrize(("first", "last", "level"), [(1, 2, "ok"), (2, 2, "error"), (9, 9, "error")])
def test_a_cut_must_leave_something_out(
    values: dict[str, Any], tmp_path: Path, first: int, last: int, level: str
) -> None:
    del values["student"]
    values["student_init"] = {"mode": "prune", "keep_first": first, "keep_last": last}
    report = check(values, tmp_path)
    (found,) = [found for found in report.checks if found.name == "student"]
    assert found.level == level
    assert len(report.errors()) == (level == "error")


def test_long_examples_are_warned_about_and_refused_if_none_fits(values: dict[str, Any], tmp_path: Path) -> None:
    lines = [json.dumps({"source": "mot " * length, "target": "word " * length}) for length in [*range(1, 30), 200]]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines), encoding="utf-8")
    values["data"]["near_duplicate_threshold"] = 1
    report = check(values, tmp_path)
    assert report.errors() == []
    assert any(found.level == "warning" and "left out" in found.hint for found in report.checks)
    assert any(found.level == "warning" and "longer answers are cut" in found.hint for found in report.checks)
    values["task"]["max_prompt_tokens"] = 3
    assert {found.name for found in check(values, tmp_path).checks if found.level == "error"} == {
        "train lengths",
        "validation lengths",
        "test lengths",
    }


def test_rows_of_one_form_are_kept_and_what_splits_lose_is_told(values: dict[str, Any], tmp_path: Path) -> None:
    def losses(texts: list[str]) -> dict[str, Check]:
        rows = [json.dumps({"source": f"{text}, 12 Harbour Road.", "target": f"SELECT '{text}'"}) for text in texts]
        (tmp_path / "rows.jsonl").write_text("\n".join(rows), encoding="utf-8")
        report = check(values, tmp_path)
        return {found.name: found for found in report.checks if found.name.endswith((" left out", "data"))}

    form = "Please convert this order of Miller and Sons Ltd for the table of orders into a statement, number"
    found = losses([f"{form} {i}" for i in range(40)])
    assert found.keys() == {"data"}
    letters = "abcdefghijklmnopqrstuvwxyz"
    texts = [f"{form} {letter}" for letter in letters]
    found = losses(texts)
    assert found["train left out"].level == "error"
    assert "20 of 20 rows (100%) are left out: 20 resemble a held-out row" in found["train left out"].what
    assert found["train left out"].what.count("is like") == 3
    assert "near_duplicate_threshold" in found["train left out"].hint
    distinct = [f"{letter * 20} {i} {letter * 30}" for i, letter in enumerate(letters)]
    found = losses([*distinct, *distinct[:20]])
    assert (found["train left out"].level, "20 repeated" in found["train left out"].what) == ("warning", True)
    found = losses([*distinct, distinct[0]])
    assert (found["train left out"].level, found["train left out"].what) == (
        "ok",
        "1 of 21 rows (5%) are left out: 1 repeated",
    )
    assert "train 20, validation 3, test 3" in found["data"].what


def test_special_tokens_in_inputs_are_counted(values: dict[str, Any], tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(values["teacher"])
    end = tokenizer.eos_token
    rows = [{"source": f"row {i} {end if i < 3 else ''}", "target": f"row {i} {end}"} for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (found,) = [found for found in check(values, tmp_path).checks if found.name == "special tokens"]
    assert (found.level, found.what) == (
        "warning",
        f"3 of 40 inputs hold special tokens of the tokenizer as text: {end} in 3",
    )


def test_long_rows_are_tokenised_in_part(values: dict[str, Any], tmp_path: Path) -> None:
    rows = [{"source": f"{i} " + "mot " * 20_000, "target": "word " * 20_000} for i in range(12)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    values["data"]["near_duplicate_threshold"] = 1
    found = {found.name: found for found in check(values, tmp_path).checks}
    assert found["train lengths"].level == "error"
    assert "10 have prompts over 96 tokens" in found["train lengths"].what
    endless = [make_example("x" * 4_000_000, "y" * 4_000_000)] * 300
    sample = preflight_data._sample(endless, RunConfig.model_validate(values).task)
    assert len(sample) == 200
    assert sum(len(row.source) + len(row.target) for row in sample) < 1_000_000


def test_batches_that_do_not_divide_are_refused(values: dict[str, Any], tmp_path: Path) -> None:
    values["distill"] = {"training": {"batch_size": 8, "micro_batch_size": 3}}
    found = only(check(values, tmp_path), "error")
    assert (found.name, found.where) == ("distill", "training.micro_batch_size")


def test_a_tracking_server_that_is_down_is_told_in_seconds(values: dict[str, Any], tmp_path: Path) -> None:
    # Port 9, "discard": nothing listens there.
    found = only(check(values, tmp_path, tracking_uri="http://127.0.0.1:9"), "error")
    assert found.name == "tracking"
    assert "does not answer" in found.what


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_asked_for_must_be_there(values: dict[str, Any], tmp_path: Path) -> None:
    assert only(check(values, tmp_path, require_gpu=True), "error").name == "GPU"


# --- the distillation's settings ----------------------------------------------------------------------------------


def test_settings_that_nothing_reads_are_pointed_out(values: dict[str, Any], tmp_path: Path) -> None:
    values["distill"] = {"method": "on_policy", "beta": 0.3, "sampling": {"rule": "mixture"}, "replaced_weight": 1}
    found = {found.where: found for found in check(values, tmp_path).checks if found.level == "warning"}
    assert set(found) == {"distill.beta", "distill.sampling.rule", "distill.replaced_weight"}
    assert "`on_policy` with divergence `forward_kl` does not read" in found["distill.beta"].what
    values["distill"] |= {"method": "skd", "divergence": "jsd"}
    assert not [found for found in check(values, tmp_path).checks if found.level == "warning"]
    # Every method runs with its defaults, and with what it alone reads.
    for method in get_args(Method):
        assert unread_settings(DistillConfig(method=method)) == []
    assert unread_settings(DistillConfig(method="imitkd", sampled_fraction={"start": 0, "end": 1})) == []  # type: ignore[arg-type]
    assert unread_settings(DistillConfig(method="sft", temperature=2.0, selective={})) == ["temperature", "selective"]  # type: ignore[arg-type]


def test_the_runs_of_a_comparison_are_looked_at_together(
    values: dict[str, Any], tmp_path: Path, save_tiny_model: SaveTinyModel
) -> None:
    narrow = save_tiny_model(tmp_path / "narrow", max_position_embeddings=64)
    runs = [
        values,
        values | {"seed": 1},
        values | {"student": str(narrow)},
        values | {"student": None, "student_init": {"mode": "prune", "keep_first": 2, "keep_last": 2}},
        values | {"distill": {"training": {"batch_size": 6, "micro_batch_size": 4}}},
    ]
    report = check(values, tmp_path, variants=[RunConfig.model_validate(run) for run in runs])
    found = {error.what.split(",")[0]: error.where for error in report.errors()}
    assert len(found) == 3
    assert "the student's context of 64 tokens" in " ".join(found)
    assert found["keep_first 2 + keep_last 2 cuts nothing from a teacher of 4 layers"] == "student_init"
    assert (
        found["micro_batch_size 4 does not divide the 6 sequences a device has in a step"]
        == "training.micro_batch_size"
    )
    assert [found.name for found in report.checks].count("student") == 4  # two models, one of them too narrow, a cut


def test_which_settings_a_method_reads() -> None:
    skd, min_prob, sft = (
        DistillConfig.model_validate(values)
        for values in ({}, {"sampling": {"rule": "min_prob"}}, {"method": "sft", "divergence": "jsd"})
    )
    paths = ["sampling.top_k", "sampling.gamma", "sampling.student.temperature", "divergence", "beta", "training"]
    read = {
        name: [path for path in paths if reads_setting(config, path)]
        for name, config in (("skd", skd), ("min_prob", min_prob), ("sft", sft))
    }
    assert read == {
        "skd": ["sampling.top_k", "sampling.gamma", "sampling.student.temperature", "divergence", "training"],
        "min_prob": ["sampling.gamma", "sampling.student.temperature", "divergence", "training"],
        "sft": ["training"],
    }
    assert reads_setting(skd, "sampling")  # a section that is read in part


def test_the_stored_teacher_signal_is_estimated(values: dict[str, Any], tmp_path: Path) -> None:
    values["distill"] = {"method": "supervised_kd", "teacher_signal": {"mode": "stored", "top_k": 100_000}}
    (found,) = [found for found in check(values, tmp_path).checks if found.name == "teacher_signal"]
    assert found.what.startswith("top 100000 tokens of ")


# --- memory -------------------------------------------------------------------------------------------------------


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
    losses = {d: largest(distill={"divergence": d})["distill"].parts["loss"] for d in get_args(DivergenceName)}
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
    monkeypatch.setattr("skd_lib.preflight.memory.available_memory", lambda: (1000, "this machine"))
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    found = only(check(values, tmp_path), "warning")
    assert found.name == "memory"
    assert "micro_batch_size" in found.hint
    # In a cluster this machine's memory says nothing about the training steps'.
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    if not torch.cuda.is_available():
        assert all(found.level == "ok" for found in check(values, tmp_path).checks)


# --- steps --------------------------------------------------------------------------------------------------------


def test_preflight_hands_on_each_steps_config_and_prepare_data_uses_its_own(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("KFP_RUN_ID", "run-1")
    tracking = f"sqlite:///{tmp_path / 'mlflow.db'}"
    values |= {"evaluation": {"batch_size": 2, "comet": {"batch_size": 4}}}
    preflight.main(
        config=json.dumps(values),
        checkpoint_root=str(tmp_path / "checkpoints"),
        report_out=tmp_path / "preflight" / "report.md",
        tracking_uri=tracking,
    )
    assert "Preflight" in capsys.readouterr().out
    assert (tmp_path / "preflight" / "report.md").read_text(encoding="utf-8").startswith("# Preflight")
    parameters = _executor_output(tmp_path / "preflight")["parameterValues"]
    seen = {name: model_fingerprint(values[name]) for name in ("teacher", "student")}
    prepared = {"data": values["data"], "fingerprint": json.loads(parameters["prepare_data"])["fingerprint"]}
    task, measured = values["task"], {"batch_size": 2}
    # Only what differs from the defaults; and of a single run nothing that a comparison needs.
    assert {name: value and json.loads(value) for name, value in parameters.items() if name != "trials"} == {
        "prepare_data": prepared,
        "teacher_sft": {"teacher": values["teacher"], "fingerprint": seen["teacher"], "task": task},
        "student_init": {"student": values["student"], "fingerprint": seen["student"], "task": task},
        "distill": {"task": task},
        "evaluate_teacher": {
            "teacher": values["teacher"],
            "fingerprint": seen["teacher"],
            "evaluation": measured,
            "task": task,
        },
        "evaluate": {"evaluation": measured, "task": task},
        "specdec_benchmark": {"task": task},
        "evaluate_champion": {"evaluation": measured, "task": task},
        "comet_score": {"evaluation": measured | {"comet": {"batch_size": 4}}, "task": task},
        "report": {"name": "tiny", "task": task},
        **dict.fromkeys(("compare_variant", "compare_table", "model_fingerprints", "plan", "problems"), ""),
    }
    assert parameters["trials"] == []
    # KFP's structured parameters cannot hold null.
    assert "null" not in json.dumps(parameters)

    def prepare() -> None:
        prepare_data.main(
            config=parameters["prepare_data"], data_out=tmp_path / "prepared" / "data", tracking_uri=tracking
        )

    prepare()
    assert "train_teacher: 32 examples" in capsys.readouterr().out
    assert PreparedData.load(tmp_path / "prepared" / "data").fingerprint
    output = _executor_output(tmp_path / "prepared")
    (artifact,) = output["artifacts"]["data"]["artifacts"]
    assert artifact["name"] == "data"
    assert _datasets(tracking) == {"train_teacher", "train_student", "validation", "test"}

    with (tmp_path / "rows.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"source": "une ligne de plus", "target": "one more row"}) + "\n")
    with pytest.raises(SkdError, match="the data changed after preflight looked at it"):
        prepare()


def test_data_are_prepared_only_where_the_config_says_which(tmp_path: Path) -> None:
    with pytest.raises(SkdError, match="--config: section `data` is missing"):
        prepare_data.main(config='{"seed": 1}', data_out=tmp_path / "data")


def test_a_step_depends_on_fields_that_there_are() -> None:
    assert {field for fields in preflight.DEPENDS.values() for field in fields} == StepConfig.model_fields.keys()


def test_a_failing_preflight_lists_everything_and_exits_with_2(values: dict[str, Any], tmp_path: Path) -> None:
    values["student"] = str(tmp_path / "missing" / "student" / "folder")
    values["data"]["source"]["columns"] = {"target": "answer"}
    command = [sys.executable, "-m", "skd_lib.steps.preflight", "--config", json.dumps(values)]
    command += ["--checkpoint-root", str(tmp_path / "checkpoints"), "--report-out", str(tmp_path / "report.md")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "5 problems found" in done.stderr  # the model, three rows, and that all have it
    assert values["student"] in done.stderr
    assert f"{tmp_path / 'rows.jsonl'}, row 1, field `answer`: the field is missing" in done.stderr
    assert "✗" in (tmp_path / "report.md").read_text(encoding="utf-8")


def test_warnings_reach_the_person_who_started_the_run(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(events.ENV, "1")
    values["task"]["metrics"] = ["chrf", "comet"]
    values["evaluation"] = {"comet": {"model": str(tmp_path / "none")}}
    preflight.main(
        config=json.dumps(values),
        checkpoint_root=str(tmp_path / "checkpoints"),
        report_out=tmp_path / "report.md",
        comet=Switch.false,
    )
    told = [event["message"] for line in capsys.readouterr().out.splitlines() if (event := events.parse(line))]
    # And COMET's model is not looked for where no step would load it.
    (of_comet,) = [message for message in told if "COMET" in message]
    assert of_comet.startswith("task.metrics: this pipeline has no step for COMET; hint")
    warned = (tmp_path / "report.md").read_text(encoding="utf-8").count("| ! |")
    assert len(told) == warned


def called(tmp_path: Path, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "skd_lib.steps.preflight", "--report-out", str(tmp_path / "report.md"), *options]
    return subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **environment})


def test_a_form_that_is_wrong_is_told_at_once_by_its_fields(tmp_path: Path) -> None:
    typed = '{"task": {"prompt": "$x$ {source}"}, "distil": {}}'
    options = [
        "--config",
        typed,
        "--model-teacher",
        "org/t",
        "--training-method",
        "magic",
        "--data-test",
        "gs://b/$(X)",
    ]
    done = called(tmp_path, *options, "--mlflow-experiment", " x", KFP_RUN_ID="run-1")
    assert done.returncode == 2
    report = (tmp_path / "report.md").read_text(encoding="utf-8")
    *_, problems = done.stderr.partition("7 problems found:\n")
    lines = problems.strip().splitlines()
    assert len(lines) == 7  # a line each, the last of the log
    for field in (
        "config, field `task.prompt`",
        "data_test",
        "mlflow_experiment",
        "model_student",
        "data_train",
        "training_method",
        "config, field `distil`",
    ):
        assert any(line.startswith(f"- {field}: ") for line in lines), field
        assert f"| form | {field}: " in report


@pytest.mark.parametrize(
    ("metrics", "level"), [(["chrf"], None), (["chrf", "comet"], "warning"), (["comet", "chrf"], "error")]
)
def test_a_pipeline_without_comet(metrics: list[str], level: str | None) -> None:
    """Where COMET is to decide, the run is refused before it starts."""
    config = '{"task": {"metrics": ' + json.dumps(metrics) + "}}"
    form = Form(config=config, data_train="x", model_teacher="t", model_student="s")
    run, plan = preflight.read(form, "", "run")
    found = preflight.without_comet(run, plan)
    assert [check.level for check in found] == ([level] if level else [])
    assert all("distillation_comet" in check.hint for check in found)
    run, plan = preflight.read(form, '{"methods": ["skd", "sft"]}', "run")
    assert [check.level for check in preflight.without_comet(run, plan)] == (["warning"] if level else [])


def test_on_a_cluster_the_report_is_seen_and_the_next_step_fails(tmp_path: Path) -> None:
    """KFP shows no artifact of a step that failed."""
    names = ("prepare_data", "trials", "report", "problems")
    told = (
        "--kfp-artifact",
        "findings=gs://b/findings",
        "--kfp-parameters",
        f"{','.join(names)}={tmp_path / 'out' / names[0]}",
    )
    done = called(tmp_path, "--model-teacher", "org/t", *told, KFP_RUN_ID="run-1", KFP_POD_NAME="pod")
    assert done.returncode == 0
    assert "model_student: which model is the student is not said" in done.stderr
    assert "| form | model_student: " in (tmp_path / "report.md").read_text(encoding="utf-8")
    given = {name: (tmp_path / "out" / name).read_text() for name in names}
    assert (given["trials"], given["prepare_data"], given["report"]) == ("[]", "", "")
    with pytest.raises(SkdErrors, match="preflight: data_train: there are no training data"):
        prepare_data.main(config=given["prepare_data"], data_out=tmp_path / "data", problems=given["problems"])


def test_texts_typed_by_hand_are_refused_in_a_cluster_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    form = Form(config='{"task": {"prompt": "$x$ {source}"}}', data_train="x", model_teacher="t", model_student="s")
    monkeypatch.delenv("KFP_RUN_ID", raising=False)
    assert preflight.read(form, "", "My run")[0].name == "my-run"
    monkeypatch.setenv("KFP_RUN_ID", "run-1")
    with pytest.raises(SkdError, match=r"field `task.prompt`: a text with `\$`") as error:
        preflight.read(form, "", "")
    assert "\\u0024" in str(error.value)
    sent = to_parameters(RunConfig.model_validate(parsed(form)))
    assert preflight.read(Form(**sent), "", "")[0].task.prompt == "$x$ {source}"


def test_later_runs_reuse_what_a_run_past_the_cache_made(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KFP_RUN_ID", "run-2")

    root = str(tmp_path / "roots")

    def fresh(reuse: Switch, comparison: str = preflight.NO_COMPARISON, **changes: Any) -> str:
        preflight.main(
            config=ascii_json(values | changes),
            comparison=comparison,
            reuse=reuse,
            checkpoint_root=root,
            report_out=tmp_path / "preflight" / "report.md",
        )
        parameters = _executor_output(tmp_path / "preflight")["parameterValues"]
        prepared, teachers = (json.loads(parameters[name]) for name in ("prepare_data", "teacher_sft"))
        assert prepared.get("fresh") == teachers.get("fresh")
        (tmp_path / "given").write_text(parameters["prepare_data"])
        return str(prepared.get("fresh", ""))

    def prepare() -> None:
        config = (tmp_path / "given").read_text()
        prepare_data.main(config=config, data_out=tmp_path / "prepared" / "data", checkpoint_root=root)

    with pytest.raises(SkdErrors):
        fresh(Switch.false, teacher="/nowhere")
    new = fresh(Switch.false)
    assert new.endswith(":run-2")
    assert fresh(Switch.true) == ""  # nothing was made yet
    fresh(Switch.false)
    prepare()
    assert fresh(Switch.true) == new
    prepare()
    assert fresh(Switch.true) == new
    assert fresh(Switch.true, seed=5) == ""  # other data
    assert fresh(Switch.true, "{}") == ""  # a comparison has a cache of its own


def test_models_whose_names_would_be_changed_are_refused_in_a_cluster_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KFP_RUN_ID", raising=False)
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    form = Form(config='{"teacher": "/models/$(X)", "student": "/models/s"}', data_train="x")
    assert preflight.read(form, "", "")[0].teacher == "/models/$(X)"
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    with pytest.raises(SkdError, match=r"model_teacher /models/\$\(X\): Kubeflow would change this name"):
        preflight.read(form, "", "")
    student = Form(config='{"student": "/models/{{x}}", "teacher": "t"}', data_train="x")
    with pytest.raises(SkdError, match="model_student"):
        preflight.read(student, "{}", "")


def parsed(form: Form) -> dict[str, Any]:
    source = {"type": "files", "train": [form.data_train]}
    return {"name": "x", "teacher": "t", "student": "s", "data": {"source": source}, **json.loads(form.config)}


def test_a_comparison_hands_on_its_trials(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KFP_RUN_ID", "run-1")
    comparison = {"methods": ["sft", "skd"], "seeds": [0, 1], "drafts": False, "skip": {"sft-seed-1": "it failed"}}
    preflight.main(
        config=ascii_json({**values, "task": values["task"] | {"prompt": "$$x$$ {{x}} {source} \U0001f600"}}),
        comparison=json.dumps(comparison),
        run_name="My comparison",
        reuse=Switch.false,
        report_out=tmp_path / "preflight" / "report.md",
    )
    parameters = _executor_output(tmp_path / "preflight")["parameterValues"]
    trials = [f"{trial['variant']}-{trial['seed']}" for trial in map(json.loads, parameters["trials"])]
    assert trials == ["sft-0", "skd-0", "skd-1"]
    plan = json.loads(parameters["plan"])
    assert (plan["reference"], plan["skipped"][0]["reason"]) == ("skd", "it failed")
    assert json.loads(parameters["model_fingerprints"]).keys() == {values["teacher"], values["student"]}
    (fresh,) = {json.loads(parameters[name])["fresh"] for name in ("prepare_data", "teacher_sft")}
    assert fresh.endswith(":run-1")
    of_trials = ("student_init", "distill", "evaluate", "specdec_benchmark")  # which compare_variant gives to each
    assert {parameters[name] for name in (*of_trials, "evaluate_champion", "comet_score", "report")} == {""}
    base = parse_section(StepConfig, parameters["compare_variant"], where="compare_variant")
    assert not base.drafts
    assert base.task.prompt == "$$x$$ {{x}} {source} \U0001f600"
    # Nothing that kubelet, Argo, KFP or its database read as their own.
    assert re.fullmatch("[ -~]*", json.dumps(parameters, ensure_ascii=False))
    assert not {text for text in ("$", "{{") if text in json.dumps(parameters)}


def test_columns_of_usual_names_are_handed_on(values: dict[str, Any], tmp_path: Path) -> None:
    rows = [{"question": row["source"], "answer": row["target"]} for row in ROWS]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    preflight.main(config=json.dumps(values), report_out=tmp_path / "preflight" / "report.md")
    parameters = _executor_output(tmp_path / "preflight")["parameterValues"]
    assert json.loads(parameters["prepare_data"])["data"]["source"]["columns"] == {
        "source": "question",
        "target": "answer",
    }
    report = (tmp_path / "preflight" / "report.md").read_text(encoding="utf-8")
    assert "| columns | input `question`, answer `answer`" in report


def test_a_cluster_without_a_place_for_checkpoints_is_warned(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "checkpoints" not in {found.name for found in check(values, tmp_path, checkpoint_root="").checks}
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    found = only(check(values, tmp_path, checkpoint_root=""), "warning")
    assert found.name == "checkpoints"
    assert "checkpoint-root" in found.hint


def _executor_output(folder: Path) -> dict[str, Any]:
    output: dict[str, Any] = json.loads((folder / "executor_output.json").read_text(encoding="utf-8"))
    return output


def _datasets(tracking_uri: str) -> set[str]:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=tracking_uri)
    experiment = client.get_experiment_by_name("skd")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    return {used.dataset.name for run in runs for used in run.inputs.dataset_inputs}


def test_a_held_out_set_that_is_missing_is_a_warning(values: dict[str, Any], tmp_path: Path) -> None:
    good = tmp_path / "good.jsonl"
    good.write_text('{"source": "a", "target": "b"}\n', encoding="utf-8")
    sets = [
        {"name": path.stem, "source": {"type": "files", "files": [str(path)]}}
        for path in (good, tmp_path / "nowhere.jsonl")
    ]
    sets[0]["task"] = {"max_new_tokens": 4096}
    report = check(values | {"data": values["data"] | {"held_out": sets}}, tmp_path)
    assert report.errors() == []
    assert len(report.data_fingerprint) == 64
    found = {(each.name, each.level): each for each in report.checks if each.name.startswith("held-out")}
    assert found["held-out good", "ok"].what == "1 rows"
    assert "context has 512" in found["held-out good", "warning"].what
    assert "No such file" in found["held-out nowhere", "warning"].what
    assert "reports this set as missing" in found["held-out nowhere", "warning"].hint


def test_several_nodes_need_a_cluster_and_the_right_to_use_it(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values["distill"] = {"multinode": {"nodes": 2}, "training": {"micro_batch_size": 4}}
    for name in ("KUBECONFIG", "KUBERNETES_SERVICE_HOST"):
        monkeypatch.delenv(name, raising=False)
    errors = "\n".join(map(str, check(values, tmp_path).errors()))
    assert "checkpoint_root is at /" in errors
    assert "needs a Kubernetes cluster, and there is none here" in errors
    with running() as kubernetes:
        monkeypatch.setenv("KUBECONFIG", str(kubernetes.kubeconfig(tmp_path)))
        remote = {"checkpoint_root": "memory://checkpoints"}
        found = {each.name: each.what for each in check(values, tmp_path, **remote).checks}
        assert found["multinode"] == "Kubernetes would take the TrainJobs; nodes asked for: 2"
        assert kubernetes.jobs == {}
        kubernetes.refused["POST"] = [403]
        refused = only(check(values, tmp_path, **remote), "error")
        assert "not allowed" in refused.what
        assert "pipelines/deploy/multinode" in refused.hint
        kubernetes.runtimes.clear()
        assert '"skd-torch" not found' in only(check(values, tmp_path, **remote), "error").what


def test_a_chat_template_that_never_ends_or_changes_rows_is_an_error(
    values: dict[str, Any], tmp_path: Path, save_tiny_model: SaveTinyModel
) -> None:
    student = save_tiny_model(tmp_path / "student")
    template = (student / "chat_template.jinja").read_text(encoding="utf-8")
    values |= {"student": str(student)}

    reads = "message['content'].replace('fichier 3', '').replace('file 1', '')"
    (student / "chat_template.jinja").write_text(template.replace("message['content']", reads), encoding="utf-8")
    report = check(values, tmp_path)
    assert {(found.level, found.what.split(" of ")[0]) for found in report.checks if found.name == "train rows"} == {
        ("error", "the chat template changes the question"),
        ("warning", "the chat template changes the answer"),
    }
    refusing = "{% if 'fichier 3' in messages[0]['content'] %}{{ raise_exception('no threes') }}{% endif %}"
    (student / "chat_template.jinja").write_text(refusing + template, encoding="utf-8")
    refused = [found for found in check(values, tmp_path).checks if found.name == "train rows"]
    assert [found.level for found in refused] == ["error"]
    assert "no threes" in refused[0].what
    assert "row " in refused[0].where
    endless = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    (student / "chat_template.jinja").write_text(endless + template, encoding="utf-8")
    found = [found for found in check(values, tmp_path).checks if found.level == "error"]
    assert [(error.name, error.what) for error in found] == [
        ("student", "the chat template does not end: given up after 1 s")
    ]


@pytest.fixture
def today(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    def be(date: str) -> None:
        monkeypatch.setattr(dates, "_today", lambda: date)

    monkeypatch.setattr("skd_lib.data.chat.try_rendering", lambda *_: None)  # no child processes: they cost seconds
    be("2024-01-31")
    return be


def printing_the_date(values: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """The configuration, with a student whose chat template prints the date."""
    student = tmp_path / "dated"
    shutil.copytree(values["student"], student)
    template = (student / "chat_template.jinja").read_text()
    dated = template.replace("{{ bos_token }}", "{{ bos_token }}{{ strftime_now('%d %B %Y') }}\n")
    (student / "chat_template.jinja").write_text(dated)
    return values | {"student": str(student)}


def test_a_date_that_is_printed_is_fixed_for_a_run_and_its_repetitions(
    values: dict[str, Any], tmp_path: Path, today: Callable[[str], None]
) -> None:
    config = RunConfig.model_validate(printing_the_date(values, tmp_path))
    plain, dated = (check_model(Checks(), "student", str(each), config) for each in (values["student"], config.student))
    assert plain is not None
    assert dated is not None
    checks, root = Checks(), str(tmp_path / "checkpoints")

    def date(root: str = root, model: Model = dated, config: RunConfig = config) -> str:
        return dates.check_date(checks, [plain, model], config, root)

    assert date(model=plain) == ""
    assert not Path(root).exists()
    assert date() == "2024-01-31"
    (found,) = checks.found
    assert (found.level, found.where) == ("warning", "task.date")
    assert "in all prompts of this run it is 2024-01-31" in found.what
    assert "set it, e.g. to 2024-01-31" in found.hint
    today("2024-02-01")
    assert date() == "2024-01-31"  # as the checkpoints there
    assert date(str(tmp_path / "elsewhere")) == date("") == "2024-02-01"
    pinned = config.model_copy(update={"task": config.task.model_copy(update={"date": "2020-02-02"})})
    assert date(config=pinned) == "2020-02-02"
    with emulated("dates"):
        assert date("gs://dates/checkpoints") == "2024-02-01"
        today("2024-02-02")
        assert date("gs://dates/checkpoints") == "2024-02-01"
    (tmp_path / "checkpoints" / dates.KEPT_IN).write_text("no date")
    assert date() == "2024-02-02"
    RunFolder(tmp_path).forget()  # --fresh
    today("2024-02-03")
    assert date() == "2024-02-03"


def test_a_held_out_set_alone_may_print_the_date(
    values: dict[str, Any], tmp_path: Path, today: Callable[[str], None]
) -> None:
    rows = tmp_path / "held_out.jsonl"
    rows.write_text('{"source": "a", "target": "b"}\n')
    held_out = {"name": "other", "source": {"type": "files", "files": [str(rows)]}, "task": {"chat_template": True}}
    values = printing_the_date(values, tmp_path)
    values["task"] = values["task"] | {"chat_template": False}
    assert check(values, tmp_path).date == ""
    values["data"] = values["data"] | {"held_out": [held_out]}
    assert check(values, tmp_path).date == "2024-01-31"


def test_preflight_hands_on_the_date(values: dict[str, Any], tmp_path: Path, today: Callable[[str], None]) -> None:
    preflight.main(
        config=json.dumps(printing_the_date(values, tmp_path)),
        comparison="{}",
        checkpoint_root=str(tmp_path / "checkpoints"),
        report_out=tmp_path / "preflight" / "report.md",
    )
    parameters = _executor_output(tmp_path / "preflight")["parameterValues"]
    steps = ("teacher_sft", "evaluate_teacher", "compare_variant", "compare_table")
    assert {json.loads(parameters[name])["task"]["date"] for name in steps} == {"2024-01-31"}
    assert "2024" not in parameters["prepare_data"]
