"""The steps `report`, `gate`, `register_model` and `finish` as command lines, one after the other as in a pipeline."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import typer
from mlflow import MlflowClient
from typer.testing import CliRunner

from skd_lib.errors import SkdError
from skd_lib.report.samples import read_samples
from skd_lib.report.sources import from_mlflow
from skd_lib.steps import finish, fitting, gate, register_model, report
from skd_lib.steps.runtime import StepIO
from skd_lib.tracking.gate import Rival
from skd_lib.tracking.registry import champion
from skd_lib.tracking.runs import step_run

from .conftest import EXPERIMENT, Runs


def run(module: Any, *arguments: str, fails: bool = False) -> str:
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(module.main)
    result = CliRunner().invoke(app, list(arguments))
    assert (result.exit_code != 0) == fails, f"{result.output}\n{result.exception!r}"
    return f"{result.output}{result.exception or ''}"


def scores(chrf: float) -> str:
    values = {"chrf": chrf, "bleu": chrf / 3}
    metrics = {
        name: {"score": value, "low": value - 1, "high": value + 1, "signature": f"{name}|v1"}
        for name, value in values.items()
    }
    return json.dumps({**metrics, "examples": 16, "seconds": 2.5})


def specdec(speedup: float) -> str:
    figures = {"acceptance_rate": speedup / 2, "tokens_per_teacher_call": 1 + speedup, "speedup": speedup}
    return json.dumps({**figures, "gamma": 5, "temperature": 0.0, "ties": 0, "seconds": 3.0, "tokens": 9})


def executor_input(folder: Path, metadata: dict[str, Any] | None = None) -> str:
    student = {"name": "student", "uri": "gs://bucket/student", "metadata": metadata or {}}
    return json.dumps(
        {
            "inputs": {"artifacts": {"student": {"artifacts": [student]}}},
            "outputs": {"outputFile": str(folder / "output.json")},
        }
    )


def parameters(folder: Path) -> dict[str, Any]:
    values = json.loads((folder / "output.json").read_text(encoding="utf-8"))["parameterValues"]
    return dict(values)


def champion_with(store: str, student_sha256: str, **figures: float) -> str:
    """What `evaluate_champion` hands on, given what it would have measured."""
    found = champion(tracking_uri=store, model_name="skd-student")
    rival = Rival() if found is None else Rival(version=found.version, figures=figures)
    same = found is not None and found.weights_sha256 == student_sha256
    return rival.model_copy(update={"is_this_student": same}).model_dump_json()


def test_from_figures_to_a_registered_champion(
    store: str, client: MlflowClient, parents: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracking = ("--tracking-uri", store, "--experiment", EXPERIMENT)
    student = tmp_path / "student"
    student.mkdir()

    samples, answers = tmp_path / "samples.jsonl", tmp_path / "predictions.jsonl"
    token = '{"text": "<b>", "by": "student"}'
    samples.write_text(f'{{"step": 1, "row": 0, "prompt": "p", "tokens": [{token}]}}\n')
    row = {"id": "0", "source": "s", "target": "a cat", "prediction": "a hat", "tokens": 3, "truncated": False}
    row["scores"] = {"chrf": 40.0}
    answers.write_text(json.dumps(row) + "\n")

    def pipeline(run_id: str, chrf: float, digest: str) -> dict[str, Any]:
        monkeypatch.setenv("KFP_RUN_ID", run_id)
        folder = tmp_path / run_id
        folder.mkdir(exist_ok=True)
        after = ("--student-after", scores(chrf), "--specdec-after", specdec(1.3))
        output = run(
            report,
            *("--run-name", "demo", "--teacher", scores(38.0), "--student-before", scores(11.0), *after),
            *("--distill-course", json.dumps({"steps": [1, 2], "rejection_rate": [0.4, 0.2], "loss": [1, 2]})),
            *(
                "--summary-out",
                str(folder / "summary.md"),
                "--summary-json-out",
                str(folder / "summary.json"),
                "--html-out",
                str(folder / "report.html"),
                *("--samples", str(samples), "--predictions-student-after", str(answers)),
                *("--predictions-student-before", str(answers), "--task-config", '{"metrics": ["chrf"]}'),
                *tracking,
            ),
        )
        assert "student after" in output
        rival = ("--champion", champion_with(store, digest, chrf=30.0))
        run(gate, *after[:2], *rival, "--executor-input", executor_input(folder), *tracking)
        decided = parameters(folder)
        metadata = {"weights_sha256": digest, "teacher": "org/teacher", "method": "skd", "data_fingerprint": "f" * 64}
        metadata["code_version"] = "sha256:abc"
        registered = ("--student", str(student), "--scores", scores(chrf), "--specdec-after", specdec(1.3))
        verdict = ("--promote", decided["promote"], "--reason", decided["reason"])
        run(register_model, *registered, *verdict, "--executor-input", executor_input(folder, metadata), *tracking)
        version = parameters(folder)["version"]
        run(finish, "--status", '{"state": "SUCCEEDED"}', "--executor-input", executor_input(folder), *tracking)
        return {**decided, "version": version}

    first = pipeline("run-1", 30.0, "a" * 64)
    assert first == {"promote": "true", "reason": "first champion of this name, with chrf 30.00", "version": "1"}
    assert pipeline("run-1", 30.0, "a" * 64)["promote"] == "true"  # resumed
    worse = pipeline("run-2", 29.0, "b" * 64)
    assert (worse["promote"], worse["version"]) == ("false", "2")
    assert pipeline("run-3", 31.0, "c" * 64)["promote"] == "true"
    assert client.get_registered_model("skd-student").aliases == {"challenger": 3, "champion": 3}
    tags = client.get_model_version("skd-student", "3").tags
    assert tags["teacher"] == "org/teacher"
    assert tags["figure.speedup"] == "1.3"
    assert tags["gate"].startswith("chrf 31.00 against 30.00 of the champion (version 1)")
    assert tags["code_version"] == "sha256:abc"  # of what distilled it, not of what registers it

    by_id = {parent.data.tags["kfp.pipeline_run_id"]: parent for parent in parents()}
    assert set(by_id) == {"run-1", "run-2", "run-3"}
    parent = by_id["run-2"]
    assert parent.info.status == "FINISHED"
    assert parent.data.metrics["student_after_chrf"] == 29.0
    assert parent.data.metrics["speedup_after"] == 1.3
    assert parent.data.tags["registered_model"] == "skd-student/2"
    assert {file.path for file in client.list_artifacts(parent.info.run_id)} == {
        *("summary.json", "summary.md", "samples.jsonl", "report.html")
    }
    kept = json.loads((tmp_path / "run-2" / "summary.json").read_text(encoding="utf-8"))
    assert kept["models"]["student_after"] == {"chrf": 29.0, "bleu": 29.0 / 3}
    assert kept["mlflow_run_id"] == parent.info.run_id
    assert kept["lengths"]["student_after"]["mean"] == 3
    assert [(found["a"], found["b"], found["difference"]) for found in kept["comparisons"]] == [
        ("student_after", "student_before", 0)
    ]
    assert kept["lineage"]["software"].startswith("Python ")
    (step,) = client.search_runs(
        [parent.info.experiment_id],
        f"tags.`kfp.task` = 'report' and tags.`mlflow.parentRunId` = '{parent.info.run_id}'",
    )
    for run_id in (parent.info.run_id, step.info.run_id):
        found = from_mlflow(run_id, store)
        assert found.samples == read_samples(samples)
        assert found.summary.to_dict() == kept
    with pytest.raises(SkdError, match="cannot be read"):
        from_mlflow("0" * 32, store)
    with pytest.raises(SkdError, match=r"the run has no summary\.json"):
        from_mlflow(client.create_run(parent.info.experiment_id).info.run_id, store)
    assert "&lt;b&gt;" in (tmp_path / "run-2" / "report.html").read_text(encoding="utf-8")


def test_a_lower_perplexity_is_the_better_one(store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tracking = ("--tracking-uri", store, "--experiment", EXPERIMENT)

    def promoted(run_id: str, perplexity: float) -> str:
        monkeypatch.setenv("KFP_RUN_ID", run_id)
        figures = json.dumps({"perplexity": {"score": perplexity, "low": 1, "high": 99}})
        task = ("--task-config", json.dumps({"metrics": ["perplexity"]}))
        rival = ("--champion", champion_with(store, "", perplexity=20.0))
        run(gate, "--student-after", figures, *rival, *task, "--executor-input", executor_input(tmp_path), *tracking)
        verdict = str(parameters(tmp_path)["promote"])
        io = executor_input(tmp_path, {"weights_sha256": f"{perplexity:064.0f}"})
        registered = ("--student", str(tmp_path), "--scores", figures, "--promote", verdict, "--executor-input", io)
        run(register_model, *registered, *tracking)
        return verdict

    assert [promoted(f"run-{value}", value) for value in (20.0, 25.0, 15.0)] == ["true", "false", "true"]


def test_without_tracking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KFP_RUN_ID")
    io = executor_input(tmp_path, {"weights_sha256": "a" * 64})
    run(gate, "--student-after", scores(30.0), "--executor-input", io)
    assert parameters(tmp_path)["promote"] == "false"
    student = ("--student", str(tmp_path), "--scores", scores(30.0), "--promote", "true")
    run(register_model, *student, "--executor-input", io)
    assert parameters(tmp_path) == {"version": ""}
    run(finish, "--status", '{"state": "FAILED", "error": {"code": 9, "message": "x"}}', "--executor-input", io)


def test_bad_arguments_are_named(store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outputs = ("--summary-out", str(tmp_path / "a"), "--summary-json-out", str(tmp_path / "b"))
    outputs = (*outputs, "--html-out", str(tmp_path / "c"))
    absent = ("--samples", str(tmp_path / "nowhere"))
    assert "cannot read the training sequences" in run(report, *absent, *outputs, fails=True)
    assert "--teacher: not JSON" in run(report, "--teacher", "{'chrf': 1}", *outputs, fails=True)
    assert "field `acceptance_rate`" in run(report, "--specdec-after", '{"speedup": 1}', *outputs, fails=True)
    assert "no score `chrf`" in run(gate, "--student-after", "{}", "--tracking-uri", store, fails=True)
    missing = ("--student", str(tmp_path / "nowhere"), "--scores", scores(1.0), "--promote", "true")
    assert "there is no such folder" in run(register_model, *missing, fails=True)
    monkeypatch.delenv("KFP_RUN_ID")
    assert "KFP_RUN_ID" in run(finish, "--status", '{"state": "FAILED"}', "--tracking-uri", store, fails=True)
    assert "field `state`" in run(finish, "--status", "{}", "--tracking-uri", store, fails=True)


def test_the_end_of_a_run_is_told_with_its_figures(store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    messages: list[str] = []

    class Channel(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            messages.append(json.loads(self.rfile.read(int(self.headers["Content-Length"])))["text"])
            self.send_response(200 if len(messages) < 3 else 400)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    with HTTPServer(("127.0.0.1", 0), Channel) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        monkeypatch.setenv("SKD_NOTIFY_WEBHOOK", f"http://127.0.0.1:{server.server_port}/hook")
        monkeypatch.setenv("KF_PIPELINES_UI_ENDPOINT", "https://kubeflow.example/pipeline/")
        with step_run(step="report", tracking_uri=store, experiment=EXPERIMENT) as step:
            step.parent.log_metrics({"student_before_chrf": 18.0, "student_after_chrf": 32.3})
        with step_run(step="register_model", tracking_uri=store, experiment=EXPERIMENT):
            pass
        # KFP 2.17 gives its exit handler this word also after a success.
        status, failed = ("--status", '{"state": "RUNNING", "error": {}}'), ("--status", '{"state": "FAILED"}')
        tracked = ("--run-name", "demo", "--tracking-uri", store, "--experiment", EXPERIMENT)
        io = ("--executor-input", executor_input(tmp_path))
        assert "the channel was notified" in run(finish, *status, *tracked, *io)
        # Not even a store that can never work keeps the message back; a channel that refuses fails no pipeline.
        run(finish, *failed, "--run-name", "demo", "--tracking-uri", "file:///nowhere", *io, fails=True)
        assert "notified" not in run(finish, *failed, "--run-name", "demo", *io)
        server.shutdown()
    link = "<https://kubeflow.example/pipeline/#/runs/details/run-1|Kubeflow>"
    assert messages[0] == f"*demo* succeeded\n• chrf of the student: 32.3 (before 18)\n{link}"
    assert messages[1:] == [f"*demo* failed\n{link}"] * 2


def comet(**found: Any) -> str:
    return json.dumps({"models": {}, "comparisons": {}, "missing": "", "seconds": 1.0, **found})


def test_comet_decides_where_it_comes_first(store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KFP_RUN_ID", "first")
    tracking = ("--tracking-uri", store, "--experiment", EXPERIMENT, "--executor-input", executor_input(tmp_path))
    task = ("--task-config", '{"metrics": ["comet", "chrf"]}', "--student-after", scores(30.0))
    score = {"score": 75.3, "low": 74.0, "high": 76.0, "signature": "comet|m"}
    judged = ("--comet", comet(models={"student_after": score}))
    run(gate, *task, *judged, *tracking)
    assert parameters(tmp_path) == {"promote": "true", "reason": "first champion of this name, with comet 75.30"}
    (tmp_path / "student").mkdir()
    student = ("--student", str(tmp_path / "student"), "--scores", scores(30.0))
    metadata = executor_input(tmp_path, {"weights_sha256": "a" * 64})
    run(register_model, *student, *judged, "--promote", "true", *tracking[:4], "--executor-input", metadata)
    monkeypatch.setenv("KFP_RUN_ID", "second")
    worse = ("--comet", comet(models={"student_after": {**score, "score": 75.0}, "champion": score}))
    rival = ("--champion", champion_with(store, ""))
    run(gate, *task, *worse, *rival, *tracking)
    assert parameters(tmp_path)["reason"].startswith("comet 75.00 against 75.30 of the champion")
    run(gate, *task, "--comet", comet(missing="no network, it's down"), *tracking)
    decided = parameters(tmp_path)
    assert decided["promote"] == "false"
    assert "COMET, is missing" in decided["reason"]


def test_a_sum_is_no_point_of_its_curve(store: str, client: MlflowClient, children: Runs, tmp_path: Path) -> None:
    names = (*fitting.SUMMED, "seconds_validation")
    metrics = tmp_path / "metrics.json"
    with step_run(step="distill", tracking_uri=store, experiment=EXPERIMENT) as step:
        for number in (0, 1, 2):
            step.log_metrics(dict.fromkeys(names, 1.0), step=number)
        figures = {**dict.fromkeys(names, 3.0), "steps": 2.0}
        fitting.write_figures(metrics, StepIO(None, {"metrics": metrics}), figures, step)
    assert json.loads(metrics.read_text()) == figures  # what comparisons read
    (child,) = children()
    assert child.data.metrics["steps"] == 2
    for name in names:
        history = client.get_metric_history(child.info.run_id, name)
        assert [(point.step, point.value) for point in history] == [(0, 1.0), (1, 1.0), (2, 1.0)]
        assert child.data.metrics[f"total_{name}"] == 3.0
