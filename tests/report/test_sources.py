"""`skd report`: the page again, from a folder; from MLflow it is tested with what logs it there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from skd_kfp.pipelines.cli import app
from skd_lib.comparison.page import render_page as render_comparison
from skd_lib.models.records import SampledSequence, to_jsonl
from skd_lib.report.page import render_page
from skd_lib.report.summary import Summary
from tests.comparison.compared import compared

ROOT = Path(__file__).parents[2]


def skd(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "skd_kfp.pipelines.cli", "report", *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), "NO_COLOR": "1", "MLFLOW_TRACKING_URI": ""},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture
def folder(tmp_path: Path, summary: Summary, samples: list[SampledSequence]) -> Path:
    """A finished run's folder."""
    folder = tmp_path / "runs" / "demo"
    folder.mkdir(parents=True)
    summary.write(folder / "summary.json")
    (folder / "samples.jsonl").write_text(to_jsonl(samples), encoding="utf-8")
    return folder


def test_from_a_folder_by_path_and_by_name(
    folder: Path, tmp_path: Path, summary: Summary, samples: list[SampledSequence]
) -> None:
    done = skd("demo", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "runs/demo/report.html\n"), done.stderr
    expected = render_page(summary, samples)
    assert (folder / "report.html").read_text(encoding="utf-8") == expected
    (folder / "samples.jsonl").unlink()
    done = skd(folder, "--output", "page.html", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "page.html\n"), done.stderr
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == render_page(summary)


def test_the_page_of_a_comparison(tmp_path: Path) -> None:
    comparison, folder = compared(), tmp_path / "runs" / "methods"
    folder.mkdir(parents=True)
    (folder / "comparison.json").write_text(comparison.to_json(), encoding="utf-8")
    done = CliRunner().invoke(app, ["report", "methods", "--runs-dir", str(tmp_path / "runs"), "--json"])
    assert done.exit_code == 0, done.output
    printed = json.loads(done.stdout)
    assert printed == {"page": str(folder / "comparison.html"), "comparison": comparison.to_dict()}
    assert (folder / "comparison.html").read_text(encoding="utf-8") == render_comparison(comparison)


def test_errors_say_what_to_do(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "runs" / "early").mkdir()
    for arguments, message in (
        (("nothing",), "there is no folder nothing or runs/nothing"),
        (("early",), "there is no summary.json, so there is nothing to report yet"),
        (("demo", "--output", "nowhere/page.html"), "cannot write the page"),
    ):
        done = skd(*arguments, cwd=tmp_path)
        assert done.returncode == 2
        assert message in done.stderr
        assert "hint: " in done.stderr


def test_a_page_that_cannot_be_made_is_no_failed_write(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> str:
        raise PermissionError(13, "Permission denied", "template")

    monkeypatch.setattr("skd_lib.report.page.render_page", broken)
    assert isinstance(CliRunner().invoke(app, ["report", str(folder)]).exception, PermissionError)
