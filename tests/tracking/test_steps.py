"""The steps `report`, `register_model` and `finish` as command lines, one after the other as in a pipeline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from mlflow import MlflowClient
from safetensors.numpy import save_file
from typer.testing import CliRunner

from skd_lib.config import MetricName, RegistryConfig
from skd_lib.errors import SkdError
from skd_lib.evaluation.predictions import Prediction
from skd_lib.models.files import weights_digest
from skd_lib.models.records import to_jsonl, write_record
from skd_lib.report.folders import write_drafts
from skd_lib.report.measured import CHAMPION, Measured
from skd_lib.report.sources import from_mlflow
from skd_lib.steps import finish, register_model, report, trained_model
from skd_lib.steps.kfp_call import called, take_call
from skd_lib.tracking.gate import Rival
from skd_lib.tracking.models import VERSIONS_TAG, model_made, model_page
from skd_lib.tracking.registry import champion
from skd_lib.tracking.runs import step_run
from tests.report.evaluations import evaluations
from tests.support import http

from .conftest import EXPERIMENT, Runs


def run(module: Any, *arguments: str, fails: bool = False) -> str:
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(module.main)
    result = CliRunner().invoke(app, list(arguments))
    assert (result.exit_code != 0) == fails, f"{result.output}\n{result.exception!r}"
    return f"{result.output}{result.exception or ''}"


def scores(chrf: float) -> dict[str, Any]:
    values = {"chrf": chrf, "bleu": chrf / 3}
    metrics = {
        name: {"score": value, "low": value - 1, "high": value + 1, "signature": f"{name}|v1"}
        for name, value in values.items()
    }
    return {**metrics, "examples": 16, "seconds": 2.5}


def specdec(speedup: float) -> dict[str, Any]:
    figures = {"acceptance_rate": speedup / 2, "tokens_per_teacher_call": 1 + speedup, "speedup": speedup}
    return {**figures, "gamma": 5, "temperature": 0.0, "ties": 0, "seconds": 3.0, "tokens": 9}


def measured(value: float, champion: Rival | None = None, *, metric: MetricName = "chrf", **registry: Any) -> str:
    """What `report` hands on."""
    return Measured(
        task_metric=metric,
        student={metric: value},
        champion=champion or Rival(),
        registry=RegistryConfig(**registry),
    ).to_parameter()


def student(folder: Path, number: int, **lineage: Any) -> Path:
    """Write a student whose weights are a number, with the record of its training."""
    folder.mkdir(exist_ok=True)
    save_file({"weights": np.array([number])}, folder / "model.safetensors")
    write_record(folder, lineage=lineage)
    return folder


def run_in(folder: Path, module: Any, *arguments: str) -> str:
    """Run a step as KFP does, on a student in a bucket; what it says."""
    words = ["--kfp-output-file", str(folder / "output.json"), "--kfp-input", "student=gs://bucket/student"]
    with called(take_call(words)[1]):
        return run(module, *arguments)


def registered(student: Path, found: str, store: str = "") -> tuple[bool, str]:
    """Register a student; whether it is promoted, and why."""
    tracking = ("--tracking-uri", store, "--experiment", EXPERIMENT) if store else ()
    said = run_in(student.parent, register_model, "--student", str(student), "--measured", found, *tracking)
    verdict, _, reason = next(line for line in said.splitlines() if "promoted: " in line).partition(": ")
    assert verdict.startswith("registered as skd-student version " if store else "not registered; ")
    return verdict.endswith("; promoted"), reason


def champion_with(store: str, student_sha256: str, **figures: float) -> Rival:
    """What `evaluate_champion` finds, given what it would have measured."""
    found = champion(tracking_uri=store, model_name="skd-student")
    rival = Rival() if found is None else Rival(version=found.version, figures=figures)
    same = found is not None and found.weights_sha256 == student_sha256
    return rival.model_copy(update={"is_this_student": same})


def test_from_figures_to_a_registered_champion(
    store: str, client: MlflowClient, parents: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracking = ("--tracking-uri", store, "--experiment", EXPERIMENT)
    token = '{"text": "<b>", "by": "student"}'
    samples = f'{{"step": 1, "row": 0, "prompt": "p", "tokens": [{token}]}}\n'
    answers = [Prediction("0", "s", "a cat", "a hat", 3, truncated=False, scores={"chrf": 40.0})]
    course = {"steps": [1, 2], "rejection_rate": [0.4, 0.2]}
    served = {"engine": "vllm", "vllm": {"command": "vllm serve org/teacher", "started": True}}

    def pipeline(run_id: str, chrf: float, weights: int) -> tuple[bool, str]:
        monkeypatch.setenv("KFP_RUN_ID", run_id)
        folder = tmp_path / run_id
        folder.mkdir(exist_ok=True)
        lineage = {
            "teacher": "org/teacher",
            "method": "skd",
            "data_fingerprint": "f" * 64,
            "code_version": "sha256:abc",
        }
        trained = student(folder / "student", weights, **lineage)
        teachers = evaluations(folder / "teachers", {"teacher": scores(38.0)}, answers)
        students = evaluations(
            folder / "students", {"student_before": scores(11.0), "student_after": scores(chrf)}, answers
        )
        write_record(students / "student_after", lineage=lineage, course=course, samples=samples)
        write_drafts(folder / "drafts", "", {"before": specdec(1.1), "after": specdec(1.3) | served})
        rival = champion_with(store, weights_digest(trained), chrf=30.0)
        (folder / "champion").mkdir(exist_ok=True)
        (folder / "champion" / CHAMPION).write_text(rival.model_dump_json())
        inputs = {
            "--teacher-evaluations": teachers,
            "--student-evaluations": students,
            "--drafts": folder / "drafts",
            "--champion": folder / "champion",
            "--report-out": folder / "report.html",
            "--figures-out": folder / "figures",
        }
        options = [word for name, path in inputs.items() for word in (name, str(path))]
        settings = ("--config", '{"name": "demo", "task": {"metrics": ["chrf"]}}')
        run_in(folder, report, *options, *settings, *tracking)
        output = json.loads((folder / "output.json").read_text(encoding="utf-8"))
        decided = registered(trained, output["parameterValues"]["measured"], store)
        run(finish, "--status", '{"state": "SUCCEEDED"}', *tracking)
        return decided

    assert pipeline("run-1", 30.0, 1) == (True, "first champion of this name, with chrf 30.00")
    assert pipeline("run-1", 30.0, 1)[0]  # resumed
    assert not pipeline("run-2", 29.0, 2)[0]
    assert pipeline("run-3", 31.0, 3)[0]
    assert client.get_registered_model("skd-student").aliases == {"challenger": 3, "champion": 3}
    version = client.get_model_version("skd-student", "3")
    assert version.source == "gs://bucket/student"
    tags = version.tags
    assert tags["teacher"] == "org/teacher"
    assert tags["figure.speedup"] == "1.3"
    assert tags["signature.chrf"] == "chrf|v1"
    assert tags["vllm_serve"] == "vllm serve org/teacher"
    assert tags["gate"].startswith("chrf 31.00 against 30.00 of the champion (version 1)")
    assert tags["code_version"] == "sha256:abc"  # of what distilled it, not of what registers it

    by_id = {parent.data.tags["kfp.pipeline_run_id"]: parent for parent in parents()}
    assert set(by_id) == {"run-1", "run-2", "run-3"}
    for number, pipeline_run in enumerate(("run-1", "run-2", "run-3"), start=1):
        made = model_made(client, by_id[pipeline_run].info.run_id)
        assert made is not None
        assert json.loads(made.tags[VERSIONS_TAG]) == [{"name": "skd-student", "version": str(number)}]
        assert f"({model_page(made)})" in client.get_model_version("skd-student", str(number)).description
    parent = by_id["run-2"]
    assert parent.info.status == "FINISHED"
    assert parent.data.metrics["student_after/chrf"] == 29.0
    assert parent.data.metrics["draft_after/speedup"] == 1.3
    assert parent.data.tags["registered_model"] == "skd-student/2"
    assert {file.path for file in client.list_artifacts(parent.info.run_id)} == {
        *("summary.json", "summary.md", "samples.jsonl", "report.html")
    }
    kept = json.loads((tmp_path / "run-2" / "figures").read_text(encoding="utf-8"))
    assert kept["models"]["student_after"] == {"chrf": 29.0, "bleu": 29.0 / 3}
    assert kept["mlflow_run_id"] == parent.info.run_id
    assert kept["lengths"]["student_after"]["mean"] == 3
    assert kept["course"]["rejection_rate"] == [0.4, 0.2]
    pairs = [(found["a"], found["b"], found["difference"]) for found in kept["comparisons"]]
    assert ("student_after", "student_before", 0) in pairs
    assert kept["lineage"]["teacher"] == "org/teacher"
    assert kept["lineage"]["software"].startswith("Python ")
    (step,) = client.search_runs(
        [parent.info.experiment_id],
        f"tags.`kfp.task` = 'report' and tags.`mlflow.parentRunId` = '{parent.info.run_id}'",
    )
    for run_id in (parent.info.run_id, step.info.run_id):
        found = from_mlflow(run_id, store)
        assert to_jsonl(found.samples) == samples
        assert found.summary.to_dict() == kept
    with pytest.raises(SkdError, match="cannot be read"):
        from_mlflow("0" * 32, store)
    with pytest.raises(SkdError, match=r"the run has no summary\.json"):
        from_mlflow(client.create_run(parent.info.experiment_id).info.run_id, store)
    assert "&lt;b&gt;" in (tmp_path / "run-2" / "report.html").read_text(encoding="utf-8")
    output = json.loads((tmp_path / "run-2" / "output.json").read_text())
    assert output == {"artifacts": {}, "parameterValues": {}}  # of the last step


def test_a_version_names_the_run_that_trained_it_also_after_a_cached_run(
    store: str, client: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether that run registered it, or only a later one that took the student from the cache."""
    monkeypatch.setenv("KFP_RUN_ID", "run-1")
    with step_run(step="distill", tracking_uri=store, experiment=EXPERIMENT) as distill:
        trainer = distill.parent.run_id
    facts = {"teacher": "org/teacher", "pipeline_run_id": "run-1", "mlflow_run_id": trainer}
    unknown = {"display_name": "distilled_student", "store_session_info": '{"Provider": "s3"}', "losses": {"train": {}}}
    folder = student(tmp_path / "student", 1, **facts, **unknown)
    for run_id in ("run-2", "run-3"):
        monkeypatch.setenv("KFP_RUN_ID", run_id)
        registered(folder, measured(30.0, Rival(version="7", missing="gone")), store)
        version = client.get_model_version("skd-student", "1")
        assert version.run_id == trainer
        assert set(version.tags) == {
            *("teacher", "pipeline_run_id", "registered_by", "weights_sha256", "weights_uri", "figure.chrf", "gate")
        }
        assert version.tags["pipeline_run_id"] == "run-1"
        assert version.tags["registered_by"] == "run-2"


@pytest.mark.parametrize("recorded", ["", "0" * 32])
def test_a_version_names_this_run_where_the_one_that_trained_it_is_not_in_the_store(
    recorded: str, store: str, client: MlflowClient, parents: Runs, tmp_path: Path
) -> None:
    folder = student(tmp_path / "student", 1, mlflow_run_id=recorded)
    registered(folder, measured(30.0), store)
    (parent,) = parents()
    assert client.get_model_version("skd-student", "1").run_id == parent.info.run_id


def test_a_lower_perplexity_is_the_better_one(store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def promoted(run_id: str, perplexity: float) -> bool:
        monkeypatch.setenv("KFP_RUN_ID", run_id)
        found = measured(perplexity, champion_with(store, "", perplexity=20.0), metric="perplexity")
        return registered(student(tmp_path / run_id, round(perplexity)), found, store)[0]

    assert [promoted(f"run-{value}", value) for value in (20.0, 25.0, 15.0)] == [True, False, True]


def test_another_attempt_decides_as_the_one_that_promoted(store: str, client: MlflowClient, tmp_path: Path) -> None:
    """As after a pod that was lost between promotion and the end of the step."""
    registered(student(tmp_path / "old", 1), measured(30.0), store)
    found = measured(31.0, champion_with(store, "", chrf=30.0))
    new = student(tmp_path / "new", 2)
    decided = registered(new, found, store)
    assert decided == (True, "chrf 31.00 against 30.00 of the champion (version 1): better")
    assert registered(new, found, store) == decided
    assert client.get_registered_model("skd-student").aliases == {"challenger": 2, "champion": 2}
    meanwhile = registered(student(tmp_path / "other", 3), measured(40.0, Rival(version="1")), store)
    assert meanwhile[1].startswith("version 2 is the champion now, and was not when this run measured")


def test_the_decision_is_in_the_steps_run(store: str, children: Runs, tmp_path: Path) -> None:
    """Whatever a reason quotes: half a surrogate pair is in no database."""
    registered(student(tmp_path / "student", 1), measured(30.0, Rival(version="1", missing="token '\ud800'")), store)
    (step,) = children()
    assert (step.data.tags["kfp.task"], step.data.tags["promote"]) == ("register_model", "False")
    assert step.data.tags["reason"].endswith(r"token '\ud800'")
    assert step.data.tags["registered_model"] == "skd-student/1"
    assert step.data.metrics["chrf"] == 30.0
    assert step.data.params["skd/registry.model_name"] == "skd-student"


def test_without_tracking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KFP_RUN_ID")
    folder = student(tmp_path / "student", 1)
    assert registered(folder, measured(30.0)) == (False, "tracking is off, so there is no registry to promote in")
    ended = run(finish, "--status", '{"state": "FAILED", "error": {"code": 9, "message": "x"}}')
    assert "a pipeline run failed\nx" in ended


def test_bad_arguments_are_named(store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # a step without artifacts writes its executor output there
    outputs = ("--report-out", str(tmp_path / "a"), "--figures-out", str(tmp_path / "b"))
    absent = ("--student-evaluations", str(tmp_path / "nowhere"))
    assert "the input `student_evaluations` is gone from storage" in run(report, *absent, *outputs, fails=True)
    assert "--comet: not JSON" in run(report, "--comet", "{'models': 1}", *outputs, fails=True)
    assert "--config, field `task.metrics.0`" in run(
        report, "--config", '{"task": {"metrics": ["x"]}}', *outputs, fails=True
    )
    there = ("--student", str(student(tmp_path / "student", 1)), "--tracking-uri", store)
    assert "--measured, field `task_metric`" in run(register_model, *there, "--measured", "{}", fails=True)
    empty = '{"task_metric": "chrf"}'
    assert "not promoted: there is no score `chrf`" in run(register_model, *there, "--measured", empty)
    missing = ("--student", str(tmp_path / "nowhere"), "--measured", empty)
    assert "the input `student` is gone from storage" in run(register_model, *missing, fails=True)
    monkeypatch.delenv("KFP_RUN_ID")
    assert "KFP_RUN_ID" in run(finish, "--status", '{"state": "FAILED"}', "--tracking-uri", store, fails=True)
    assert "field `state`" in run(finish, "--status", "{}", "--tracking-uri", store, fails=True)


def test_the_end_of_a_run_is_told_with_its_figures(store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    messages: list[str] = []

    class Channel(http.Handler):
        def do_POST(self) -> None:
            messages.append(json.loads(self.rfile.read(int(self.headers["Content-Length"])))["text"])
            self.send_response(200 if len(messages) < 3 else 400)
            self.end_headers()

    with http.Server(Channel) as server:
        monkeypatch.setenv("SKD_NOTIFY_WEBHOOK", f"{server.url}/hook")
        monkeypatch.setenv("KF_PIPELINES_UI_ENDPOINT", "https://kubeflow.example/pipeline/")
        with step_run(step="report", tracking_uri=store, experiment=EXPERIMENT) as step:
            step.parent.log_metrics({"student_before/chrf": 18.0, "student_after/chrf": 32.3})
        with step_run(step="register_model", tracking_uri=store, experiment=EXPERIMENT):
            pass
        # KFP 2.17 gives its exit handler this word also after a success.
        status, failed = ("--status", '{"state": "RUNNING", "error": {}}'), ("--status", '{"state": "FAILED"}')
        tracked = ("--run-name", "demo", "--tracking-uri", store, "--experiment", EXPERIMENT)
        assert "the channel was notified" in run(finish, *status, *tracked)
        # Not even a store that can never work keeps the message back; a channel that refuses fails no pipeline.
        run(finish, *failed, "--run-name", "demo", "--tracking-uri", "file:///nowhere", fails=True)
        assert "notified" not in run(finish, *failed, "--run-name", "demo")
    link = "<https://kubeflow.example/pipeline/#/runs/details/run-1|Kubeflow>"
    assert messages[0] == f"*demo* succeeded\n• chrf of the student: 32.3 (before 18)\n{link}"
    assert messages[1:] == [f"*demo* failed\n{link}"] * 2


def test_comet_decides_where_it_comes_first(store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KFP_RUN_ID", "first")
    first = registered(student(tmp_path / "first", 1), measured(75.3, metric="comet"), store)
    assert first == (True, "first champion of this name, with comet 75.30")
    monkeypatch.setenv("KFP_RUN_ID", "second")
    worse = measured(75.0, champion_with(store, "", comet=75.3), metric="comet")
    second = student(tmp_path / "second", 2)
    assert registered(second, worse, store)[1].startswith("comet 75.00 against 75.30 of the champion")
    missing = json.dumps({"task_metric": "comet", "student": {"chrf": 30.0}, "comet_missing": "no network, it's down"})
    promoted, reason = registered(second, missing, store)
    assert not promoted
    assert "COMET, is missing" in reason


@pytest.mark.parametrize(
    ("metrics", "comet", "missing"),
    [
        (["comet", "chrf"], "", "this pipeline has no step for COMET: start its version with COMET"),
        (["comet", "chrf"], '{"missing": "no network"}', "no network"),
        (["chrf"], "", ""),
    ],
)
def test_comet_is_missing_where_the_pipeline_has_no_step_for_it(
    metrics: list[str], comet: str, missing: str, tmp_path: Path
) -> None:
    students = evaluations(tmp_path / "students", {"student_after": scores(30.0)})
    config = json.dumps({"task": {"metrics": metrics}})
    outputs = ("--report-out", str(tmp_path / "report"), "--figures-out", str(tmp_path / "figures"))
    run_in(tmp_path, report, "--config", config, "--student-evaluations", str(students), "--comet", comet, *outputs)
    told = json.loads((tmp_path / "figures").read_text(encoding="utf-8"))["missing"].get("comet", "")
    assert told.startswith(missing)
    handed_on = json.loads((tmp_path / "output.json").read_text())["parameterValues"]["measured"]
    assert json.loads(handed_on).get("comet_missing", "").startswith(missing)
    assert bool(told) == bool(missing)


def test_a_sum_is_no_point_of_its_curve(store: str, client: MlflowClient, children: Runs) -> None:
    figures = (*trained_model.SUMMED, "seconds_validation")
    with step_run(step="distill", tracking_uri=store, experiment=EXPERIMENT) as step:
        for number in (0, 1, 2):
            step.log_metrics(trained_model.grouped(dict.fromkeys(figures, 1.0)), step=number)
        closing = {**dict.fromkeys(figures, 3.0), "steps": 2.0}
        trained_model.log_outcome(step, closing, {}, "gs://bucket/student")
    (child,) = children()
    assert child.data.metrics["final/steps"] == 2
    for figure in figures:
        (name,) = trained_model.grouped({figure: 0.0})
        history = client.get_metric_history(child.info.run_id, name)
        assert [(point.step, point.value) for point in history] == [(0, 1.0), (1, 1.0), (2, 1.0)]
        assert child.data.metrics[f"final/{figure}"] == 3.0
