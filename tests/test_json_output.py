"""`--json`: standard output is JSON and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from skd_kfp.pipelines.cli.options import say_json
from tests.conftest import ROOT, SaveTinyModel, Skd
from tests.kubeflow import small
from tests.kubeflow.fake_kfp import FakeKfp, running
from tests.support.local_runs import finished_run

DEMO = ROOT / "pipelines/configs/demo.yaml"


def refused(text: str) -> None:
    raise AssertionError(f"{text} is not JSON")


def test_numbers_that_json_does_not_have_are_null(capsys: pytest.CaptureFixture[str]) -> None:
    say_json({"loss": float("nan"), "all": [1.5, (float("inf"),)]}, lines=True)
    assert json.loads(capsys.readouterr().out, parse_constant=refused) == {"loss": None, "all": [1.5, [None]]}


def test_texts_cannot_steer_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    say_json("\x1b[31m\u202e")
    printed = capsys.readouterr().out
    assert json.loads(printed) == "\x1b[31m\u202e"
    assert printed.isascii()
    assert "\x1b" not in printed


@pytest.mark.parametrize(
    ("arguments", "keys"),
    [
        (["run", DEMO, "--dry-run"], {"config", "steps", "files", "mlflow"}),
        (["compare", ROOT / "pipelines/configs/compare-demo.yaml", "--dry-run"], {"config", "comparison"}),
        (["submit", DEMO, "--dry-run"], {"run", "pipeline", "images", "experiment"}),
        (["submit", DEMO, "--dry-run", "--recurring", "0 3 * * *"], {"run", "schedule"}),
        (["doctor"], {"ok", "checks"}),
    ],
)
def test_standard_output_is_one_value(skd: Skd, tmp_path: Path, arguments: list[str], keys: set[str]) -> None:
    done = skd(*arguments, "--json", *(["--runs-dir", tmp_path] if arguments[0] != "submit" else []))
    told = json.loads(done.stdout, parse_constant=refused)
    assert keys <= told.keys()


def test_the_plan_names_each_step_and_what_it_waits_for(skd: Skd) -> None:
    steps = {step["name"]: step for step in json.loads(skd("run", DEMO, "--dry-run", "--json").stdout)["steps"]}
    assert "preflight" in steps
    assert steps["distill"]["command"] == "skd_lib.steps.distill"
    assert "student_init" in steps["distill"]["after"]


def test_a_fields_default_is_a_text(skd: Skd) -> None:
    (field,) = json.loads(skd("config", "seed", "--json").stdout)
    assert field == {"path": "seed", "type": "int", "default": "0", "description": ""}


def test_a_reports_figures(skd: Skd, tmp_path: Path, save_tiny_model: SaveTinyModel) -> None:
    root = finished_run(tmp_path, "demo", save_tiny_model)
    told = json.loads(skd("report", "demo", "--runs-dir", tmp_path, "--json").stdout)
    assert told["page"] == str(root / "report.html")
    assert told["summary"]["models"]["student_after"] == {"chrf": 35.3}


def test_a_running_pipeline_has_no_plan(skd: Skd) -> None:
    done = skd("run", DEMO, "--json")
    assert done.returncode == 2
    assert "add --dry-run" in done.stderr


@pytest.mark.parametrize(("options", "key"), [([], "run_id"), (["--recurring", "0 3 * * *"], "recurring_run_id")])
def test_a_submission_prints_its_id_and_its_page(
    skd: Skd, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, options: list[str], key: str
) -> None:
    monkeypatch.setenv("KF_PIPELINES_SA_TOKEN_PATH", str(tmp_path / "no-token"))
    with running(FakeKfp()) as kfp:
        done = skd("submit", DEMO, "--host", kfp.host, "--pipeline", small.package().path, "--json", *options)
    told = json.loads(done.stdout)
    assert told["url"].endswith(told[key])
    assert "experiment   skd" in done.stderr
