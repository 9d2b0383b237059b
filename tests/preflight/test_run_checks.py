"""A good run passes, and everything that is wrong with a bad one is found at once."""

from __future__ import annotations

from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from skd_lib.config import DistillConfig, RunConfig
from skd_lib.distillation.methods import METHODS, reads_setting, unread_settings
from skd_lib.errors import SkdError, SkdErrors, Transient
from skd_lib.models.fingerprint import short
from skd_lib.models.references import model_fingerprint
from skd_lib.preflight import Check, PreflightReport
from skd_lib.preflight.checks import Checks
from tests.conftest import SaveTinyModel
from tests.multinode.fake_kubernetes import running
from tests.preflight.support import check, only


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
    found = only(check(values | {"evaluation": {"comet": {"model": "no-owner/no-such-model"}}}, tmp_path), "warning")
    assert (found.name, found.where) == ("comet", "no-owner/no-such-model")
    assert found.what.startswith("no scores by COMET: cannot reach")


def test_what_may_pass_by_itself_may_be_tried_again() -> None:
    checks = Checks()
    checks.attempt("data", storage_is_away)
    with pytest.raises(SkdErrors) as found:
        PreflightReport(checks.found).raise_errors()
    assert found.value.exit_code == Transient.exit_code
    checks.failed("model", SkdError("wrong"))
    with pytest.raises(SkdErrors) as found:
        PreflightReport(checks.found).raise_errors()
    assert found.value.exit_code == SkdError.exit_code


def storage_is_away() -> None:
    raise Transient("away")


def test_the_report_is_shown_as_table_and_as_markdown() -> None:
    report = PreflightReport([Check("data", "error", "a | b\n[bold]c", where="rows.jsonl, row 3", hint="correct it")])
    console = Console(width=100, file=StringIO())
    console.print(report.table())
    shown = console.file.getvalue()
    assert "✗" in shown
    assert "rows.jsonl, row 3: a | b" in shown
    assert "[bold]c" in shown
    assert report.markdown().splitlines()[-1] == "| ✗ | data | rows.jsonl, row 3: a \\| b<br>[bold]c | correct it |"


def test_everything_wrong_is_found_at_once(values: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "rows.jsonl").write_text('{"source": "a", "target": "b"}\n{"source": "a"}\n{\n', encoding="utf-8")
    values |= {"teacher": "no-owner/no-such-model", "student": str(tmp_path)}
    report = check(
        values,
        tmp_path,
        checkpoint_root=str(tmp_path / "file" / "checkpoints"),
        pipeline_root="gs://",
        tracking_uri="file:./mlruns",
    )
    errors = {(found.name, found.where) for found in report.checks if found.level == "error"}
    assert errors == {
        ("teacher", "no-owner/no-such-model"),
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


def test_a_tracking_server_that_is_down_is_told_in_seconds(values: dict[str, Any], tmp_path: Path) -> None:
    # Port 9, "discard": nothing listens there.
    found = only(check(values, tmp_path, tracking_uri="http://127.0.0.1:9"), "error")
    assert found.name == "tracking"
    assert "does not answer" in found.what


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_asked_for_must_be_there(values: dict[str, Any], tmp_path: Path) -> None:
    assert only(check(values, tmp_path, require_gpu=True), "error").name == "GPU"


def test_a_cluster_without_a_place_for_checkpoints_is_warned(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "checkpoints" not in {found.name for found in check(values, tmp_path, checkpoint_root="").checks}
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    found = only(check(values, tmp_path, checkpoint_root=""), "warning")
    assert found.name == "checkpoints"
    assert "checkpoint-root" in found.hint


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


def test_settings_that_nothing_reads_are_pointed_out(values: dict[str, Any], tmp_path: Path) -> None:
    values["distill"] = {"method": "on_policy", "beta": 0.3, "sampling": {"rule": "mixture"}, "replaced_weight": 1}
    found = {found.where: found for found in check(values, tmp_path).checks if found.level == "warning"}
    assert set(found) == {"distill.beta", "distill.sampling.rule", "distill.replaced_weight"}
    assert "`on_policy` with divergence `forward_kl` does not read" in found["distill.beta"].what
    values["distill"] |= {"method": "skd", "divergence": "jsd"}
    assert not [found for found in check(values, tmp_path).checks if found.level == "warning"]
    # Every method runs with its defaults, and with what it alone reads.
    for method in METHODS:
        assert unread_settings(DistillConfig(method=method)) == []
    assert unread_settings(DistillConfig(engine="vllm")) == []
    assert unread_settings(DistillConfig(method="sft", engine="vllm")) == ["engine"]
    assert unread_settings(DistillConfig(method="imitkd", sampled_fraction={"start": 0, "end": 1})) == []  # type: ignore[arg-type]
    assert unread_settings(DistillConfig(method="sft", temperature=2.0, selective={})) == ["temperature", "selective"]  # type: ignore[arg-type]


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


def test_a_prompt_and_an_answer_must_fit_into_both_contexts(
    values: dict[str, Any], tmp_path: Path, save_tiny_model: SaveTinyModel
) -> None:
    student = save_tiny_model(tmp_path / "student", max_position_embeddings=128)
    found = only(check(values | {"student": str(student)}, tmp_path), "error")
    assert "max_prompt_tokens 96 + max_new_tokens 64 exceed the student's context of 128" in found.what


def test_vllm_needs_room_for_its_drafts_in_both_contexts(
    values: dict[str, Any], tmp_path: Path, save_tiny_model: SaveTinyModel
) -> None:
    values["student"] = str(save_tiny_model(tmp_path / "student", max_position_embeddings=96 + 64 + 11))
    found = only(check(values | {"distill": {"engine": "vllm"}}, tmp_path), "error")
    assert "160, leave fewer than 12 positions of the student's context of 171" in found.what
    assert not check(values | {"distill": {"engine": "vllm", "sampling": {"gamma": 4}}}, tmp_path).errors()


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
