"""From a registered version back to what made it, as the pipeline's own steps record it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from mlflow import MlflowClient
from typer.testing import CliRunner

from skd_kfp.pipelines.cli import app
from skd_lib.errors import SkdError
from skd_lib.models.files import weights_digest
from skd_lib.steps import finish, prepare_data
from skd_lib.tracking.lineage import parse_model, trace
from skd_lib.tracking.runs import step_run

from .conftest import EXPERIMENT
from .test_steps import measured, run, student
from .test_steps import registered as register_student

IMAGE = "ghcr.io/example/skd-train@sha256:" + "a" * 64


@pytest.fixture
def registered(store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The data file of a run whose student was registered by the real steps."""
    monkeypatch.setenv("SKD_IMAGE", IMAGE)
    monkeypatch.setenv("SKD_CODE_VERSION", "git 1234567")
    tracking = ("--tracking-uri", store, "--experiment", EXPERIMENT)
    data = tmp_path / "rows.jsonl"
    rows = [{"source": f"question {hashlib.md5(bytes([i])).hexdigest()}", "target": f"answer {i}"} for i in range(40)]  # noqa: S324
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    config = {
        "source": {"type": "files", "train": [str(data)]},
        "teacher_examples": 10,
        "student_examples": 10,
        "validation_examples": 5,
        "test_examples": 5,
    }
    run(prepare_data, "--config", json.dumps({"data": config}), "--data-out", str(tmp_path / "data"), *tracking)
    with step_run(step="distill", tracking_uri=store, experiment=EXPERIMENT) as distill:
        distill.set_tags({"code_version": "git 1234567"})
        trainer = distill.parent.run_id
    facts = {
        "teacher": "org/teacher@main",
        "teacher_weights_sha256": "d" * 64,
        "teacher_fingerprint": "commit:" + "1" * 40,
        "base_student": "org/student",
        "base_student_fingerprint": "sha256:" + "2" * 64,
        "initial_weights_sha256": "e" * 64,
        "method": "skd",
        "top_k": 25,
        "data_fingerprint": "f" * 64,
        "code_version": "git 1234567",
        "pipeline_run_id": "run-1",
        "mlflow_run_id": trainer,
    }
    folder = student(tmp_path / "student", 1, **facts)
    register_student(folder, measured(30.0), store)
    run(finish, "--status", '{"state": "SUCCEEDED"}', *tracking)
    return data


def test_everything_is_traced(registered: Path, store: str, client: MlflowClient, tmp_path: Path) -> None:
    for reference in ("skd-student", "skd-student@champion", "skd-student@challenger", "skd-student/1"):
        found = trace(tracking_uri=store, reference=reference)
        assert (found.model, found.version) == ("skd-student", "1")
    assert sorted(found.aliases) == ["challenger", "champion"]
    assert found.student.reference == "gs://bucket/student"
    assert found.student.sha256 == weights_digest(tmp_path / "student")
    assert (found.teacher.reference, found.teacher.sha256) == ("org/teacher@main", "d" * 64)
    assert (found.base.reference, found.base.sha256) == ("org/student", "e" * 64)
    assert (found.teacher.fingerprint, found.base.fingerprint) == ("commit:" + "1" * 40, "sha256:" + "2" * 64)
    assert found.distillation == {"method": "skd", "top_k": "25"}
    assert found.data_fingerprint == "f" * 64
    (read,) = found.data_objects
    assert read["checksum"] == f"sha256:{hashlib.sha256(registered.read_bytes()).hexdigest()}"
    assert read["size"] == registered.stat().st_size
    assert str(registered) in found.data_source["train"]
    splits = {split.name: split for split in found.data}
    assert (splits["train_student"].rows, splits["train_student"].use) == (10, "train")
    assert all(len(split.sha256) == 64 for split in found.data)
    assert found.code_version == "git 1234567"
    assert found.images == [IMAGE]
    assert (found.pipeline_run_id, found.state) == ("run-1", "SUCCEEDED")
    assert [step.name for step in found.steps] == ["prepare_data", "distill", "register_model"]
    assert {step.name: step.code_version for step in found.steps}["distill"] == "git 1234567"
    assert {step.status for step in found.steps} == {"FINISHED"}
    assert found.figures["chrf"] == 30.0
    assert (found.gate, found.champion["by"]) == ("first champion of this name, with chrf 30.00", "the pipeline's gate")
    assert found.missing == []


def test_steps_from_the_cache_are_found_in_the_run_that_made_them(
    registered: Path, store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a run with another K: data, teacher and student init are an earlier run's."""
    tracking = {"tracking_uri": store, "experiment": EXPERIMENT}
    first = trace(tracking_uri=store, reference="skd-student/1")
    for run_id, step, digest in [
        ("run-0", "student_init", "0" * 64),
        ("run-1", "teacher_sft", "d" * 64),
        ("run-1", "student_init", "e" * 64),
    ]:
        monkeypatch.setenv("KFP_RUN_ID", run_id)
        with step_run(step=step, **tracking) as ours:
            ours.set_tags({"weights_sha256": digest})
    prepared = json.loads((tmp_path / "data" / "manifest.json").read_text())["fingerprint"]

    monkeypatch.setenv("KFP_RUN_ID", "run-2")
    with step_run(step="distill", **tracking) as distill:
        trainer = distill.parent.run_id
    facts = {"teacher_weights_sha256": "d" * 64, "initial_weights_sha256": "e" * 64, "data_fingerprint": prepared}
    folder = student(tmp_path / "other", 2, **facts, pipeline_run_id="run-2", mlflow_run_id=trainer)
    register_student(folder, measured(31.0), store)
    found = trace(tracking_uri=store, reference="skd-student/2")
    assert (found.pipeline_run_id, found.registered_by) == ("run-2", "run-2")
    assert [step.name for step in found.steps] == [
        *("prepare_data", "teacher_sft", "student_init"),
        *("distill", "register_model"),
    ]
    assert found.data_objects == first.data_objects
    assert found.data == first.data
    assert found.images == [IMAGE]
    assert found.missing == []


def test_as_a_tree_and_as_json(registered: Path, store: str, client: MlflowClient) -> None:
    client.set_model_version_tag("skd-student", "1", "gate", "first [champion]")
    tree = CliRunner().invoke(app, ["lineage", "skd-student", "--tracking-uri", store])
    assert tree.exit_code == 0, tree.output
    for text in ("org/teacher@main", "d" * 64, IMAGE, str(registered), "git 1234567", "first [champion]", "run-1"):
        assert text in tree.output
    printed = CliRunner().invoke(app, ["lineage", "skd-student", "--json", "--tracking-uri", store])
    assert json.loads(printed.output) == trace(tracking_uri=store, reference="skd-student").model_dump(mode="json")


def test_what_cannot_be_traced_is_told(store: str, client: MlflowClient) -> None:
    client.create_registered_model("bare")
    client.create_model_version("bare", "gs://bucket/x", run_id=None)
    found = trace(tracking_uri=store, reference="bare/1")
    assert found.missing == ["the version names no MLflow run"]
    with pytest.raises(SkdError, match="neither alias `champion` nor `challenger`") as caught:
        trace(tracking_uri=store, reference="bare")
    assert caught.value.hint == "its aliases are: none; its versions: 1 (write bare/VERSION)"
    client.set_registered_model_alias("bare", "good", "1")
    with pytest.raises(SkdError, match="no alias `best`") as caught:
        trace(tracking_uri=store, reference="bare@best")
    assert caught.value.hint.startswith("its aliases are: `good` (version 1); its versions: 1")
    with pytest.raises(SkdError, match="no such registered model"):
        trace(tracking_uri=store, reference="nobody@champion")
    tree = CliRunner().invoke(app, ["lineage", "bare/1", "--tracking-uri", store])
    assert "not traced the version names no MLflow run" in tree.output


@pytest.mark.parametrize(
    ("reference", "parts"),
    [("a/b/3", ("a/b", "3", "")), ("a@champion", ("a", "", "champion")), ("a", ("a", "", ""))],
)
def test_references(reference: str, parts: tuple[str, str, str]) -> None:
    assert parse_model(reference) == parts


@pytest.mark.parametrize("reference", ["", "@champion", "a@", "a/b"])
def test_what_is_no_reference(reference: str) -> None:
    with pytest.raises(SkdError, match="not a registered model"):
        parse_model(reference)


def test_a_step_whose_run_was_adopted_from_kubeflow_keeps_its_code_version(store: str, client: MlflowClient) -> None:
    experiment = client.create_experiment(EXPERIMENT)
    parent = client.create_run(experiment).info.run_id
    cases = (
        ({"code_version": "sha256:abc"}, "sha256:abc"),
        ({"skd.version": "0.1.0"}, "skd-lib 0.1.0"),
        ({"code_version": "sha256:abc", "skd.version": "0.1.0"}, "sha256:abc"),
        ({}, ""),
    )
    for number, (tags, _) in enumerate(cases):
        client.create_run(experiment, tags={**tags, "mlflow.parentRunId": parent, "kfp.task": str(number)})
    client.create_registered_model("student")
    client.create_model_version("student", "gs://bucket/x", run_id=parent)
    steps = trace(tracking_uri=store, reference="student/1").steps
    assert {step.name: step.code_version for step in steps} == {
        str(number): version for number, (_, version) in enumerate(cases)
    }
