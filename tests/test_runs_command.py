"""`skd runs`."""

from __future__ import annotations

import json
import os
from pathlib import Path

from skd_kfp.pipelines.local.folder import RunFolder
from tests.conftest import SaveTinyModel, Skd
from tests.support.local_runs import finished_run


def test_runs_are_listed_with_state_and_figures(skd: Skd, tmp_path: Path, save_tiny_model: SaveTinyModel) -> None:
    finished = finished_run(tmp_path, "finished", save_tiny_model)
    stopped = finished_run(tmp_path, "stopped", save_tiny_model)
    running = finished_run(tmp_path, "running", save_tiny_model)
    broken = finished_run(tmp_path, "broken", save_tiny_model)
    (tmp_path / "mlartifacts").mkdir()
    (stopped / "summary.json").unlink()
    (broken / "config.yaml").write_text("name: [")
    (running / "config.yaml").write_text("name: running\ndistill:\n")  # one odd file must not hide the other runs
    for age, folder in enumerate((finished, stopped, running, broken)):
        for file in ("run.json", "summary.json"):
            if (folder / file).exists():
                os.utime(folder / file, (1e9 - 86400 * age,) * 2)
    # It was started again after its figures were written.
    os.utime(running / "summary.json", (1e9 - 86400 * 9,) * 2)
    with RunFolder(running).locked():
        told = json.loads(skd("runs", "--runs-dir", tmp_path, "--json").stdout)
        table = skd("runs", "--runs-dir", tmp_path).stdout
    assert [(run["name"], run["state"]) for run in told] == [
        ("finished", "finished"),
        ("stopped", "stopped"),
        ("running", "running"),
        ("broken", "finished"),
    ]
    assert told[0]["scores"] == {"teacher": 46.8, "student_before": 17.1, "student_after": 35.3}
    assert told[0]["seconds"] == 125
    assert told[0]["acceptance_rate"] == 0.6
    assert told[0]["changed"] == "2001-09-09T01:46:40+00:00"
    assert told[1]["scores"] == told[2]["scores"] == {}
    assert "config.yaml" in told[3]["problem"]
    assert "chrF 17.1 → 35.3" in table
    assert "broken: " in table
    state = json.loads(skd("runs", "--runs-dir", tmp_path, "--json").stdout)[2]["state"]
    assert state == "stopped"


def test_no_runs(skd: Skd, tmp_path: Path) -> None:
    assert "there are no runs" in skd("runs", "--runs-dir", tmp_path).stdout
    assert skd("runs", "--runs-dir", tmp_path, "--json").stdout == "[]\n"
    missing = skd("runs", "--runs-dir", tmp_path / "missing")
    assert missing.returncode == 2
    assert "there is no such folder" in missing.stderr
