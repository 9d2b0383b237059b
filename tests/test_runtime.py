"""What every step shares: KFP's executor output, and how a step fails."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from skd_lib import events
from skd_lib.steps.runtime import StepIO


def executor_input(folder: Path) -> str:
    def artifact(name: str, uri: str, **metadata: object) -> dict[str, object]:
        kind = {"schemaTitle": "system.Model", "schemaVersion": "0.0.1"}
        return {"artifacts": [{"name": name, "type": kind, "uri": uri, "metadata": metadata}]}

    outputs = {name: artifact(name, f"gs://bucket/{name}") for name in ("student", "metrics")}
    return json.dumps(
        {
            "inputs": {"artifacts": {"teacher": artifact("teacher", "gs://bucket/t", layers=30.0, loss=0.5, a="x")}},
            "outputs": {"artifacts": outputs, "outputFile": str(folder / "kfp" / "executor_output.json")},
        }
    )


def test_every_output_artifact_is_listed_with_its_remote_uri(tmp_path: Path) -> None:
    io = StepIO(executor_input(tmp_path), {"student": tmp_path / "out" / "student", "metrics": tmp_path / "out" / "m"})
    io.metadata("student", weights_sha256="abc")
    io.parameter("course", {"steps": [1, 2]})
    written = json.loads(io.write().read_text())
    assert {name: value["artifacts"][0]["uri"] for name, value in written["artifacts"].items()} == {
        "student": "gs://bucket/student",
        "metrics": "gs://bucket/metrics",
    }
    assert written["artifacts"]["student"]["artifacts"][0]["metadata"] == {"weights_sha256": "abc"}
    assert written["parameterValues"] == {"course": {"steps": [1, 2]}}
    assert (tmp_path / "kfp" / "executor_output.json").is_file()


def test_metadata_of_inputs_has_whole_numbers_again(tmp_path: Path) -> None:
    io = StepIO(executor_input(tmp_path), {})
    metadata = io.input_metadata("teacher")
    assert metadata == {"layers": 30, "loss": 0.5, "a": "x"}
    assert isinstance(metadata["layers"], int)
    assert io.input_uri("teacher", tmp_path) == "gs://bucket/t"
    assert io.input_metadata("student") == {}


def test_lists_of_inputs_are_where_kfps_launcher_puts_them() -> None:
    uris = ["gs://bucket/a/b", "s3://bucket/c", "/local/d"]
    artifacts = [{"uri": uri, "metadata": {"steps": float(number)}} for number, uri in enumerate(uris)]
    io = StepIO(json.dumps({"inputs": {"artifacts": {"figures": {"artifacts": artifacts}}}}), {})
    assert io.input_list("figures") == [
        (Path("/gcs/bucket/a/b"), {"steps": 0}),
        (Path("/s3/bucket/c"), {"steps": 1}),
        (Path("/local/d"), {"steps": 2}),
    ]
    assert StepIO(None, {}).input_list("figures") == []


def test_by_hand_the_output_lies_beside_the_first_artifact(tmp_path: Path) -> None:
    io = StepIO(None, {"model": tmp_path / "model"})
    path = io.write()
    assert path == tmp_path / "executor_output.json"
    assert json.loads(path.read_text())["artifacts"]["model"]["artifacts"][0]["uri"] == str(tmp_path / "model")


STEP = """
import sys
from skd_lib.errors import SkdError
from skd_lib.steps.runtime import run_step

def main() -> None:
    raise {error}

run_step(main)
"""


def run(error: str, tmp_path: Path, **env: str) -> subprocess.CompletedProcess[str]:
    script = tmp_path / "step.py"
    script.write_text(STEP.format(error=error))
    root = str(Path(__file__).parents[1])
    return subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, check=False, env={"PYTHONPATH": root, **env}
    )


def test_what_the_user_can_mend_is_a_sentence_and_exit_code_2(tmp_path: Path) -> None:
    done = run("SkdError('broken', where='data.jsonl, row 3', hint='mend it')", tmp_path)
    assert done.returncode == 2
    assert "error: data.jsonl, row 3: broken\n  hint: mend it" in done.stderr
    assert "Traceback" not in done.stderr


def test_anything_else_keeps_its_traceback_in_the_log_and_tells_the_runner(tmp_path: Path) -> None:
    done = run("ValueError('unexpected')", tmp_path, SKD_EVENTS="1")
    assert done.returncode == 70
    assert "Traceback" in done.stderr
    told = [event for line in done.stdout.splitlines() if (event := events.parse(line))]
    message = "this is a bug in skd: ValueError: unexpected; please report it and attach this step's log"
    assert told == [{"event": "error", "message": message}]


def test_by_hand_the_traceback_is_in_a_file(tmp_path: Path) -> None:
    done = run("ValueError('unexpected\\x1b[2J http://me:secret@host/')", tmp_path, TMPDIR=str(tmp_path))
    assert done.returncode == 70
    (line,) = done.stderr.splitlines()
    (file,) = tmp_path.glob("skd-bug-*.txt")
    what = "ValueError: unexpected␛[2J http://***@host/"
    assert line == f"error: this is a bug in skd: {what}; please report it and attach {file}"
    assert "Traceback" in file.read_text()
    assert "secret" not in file.read_text()


def test_what_kfp_cannot_hold_is_left_out_before_its_launcher_fails(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    io = StepIO(None, {"metrics": tmp_path / "metrics"})
    io.metrics("metrics", {"loss": math.nan, "chrf": 1.5})
    io.metadata("metrics", reason=None)
    io.parameter("scores", {"chrf": {"score": 1.5, "low": -math.inf}, "course": [1.0, math.nan]})
    written = io.write().read_text()
    assert "NaN" not in written
    assert "Infinity" not in written
    output = json.loads(written)
    assert output["artifacts"]["metrics"]["artifacts"][0]["metadata"] == {"chrf": 1.5}
    assert output["parameterValues"] == {"scores": {"chrf": {"score": 1.5}, "course": [1.0, None]}}
    assert "of metrics: loss (nan)" in caplog.text
    assert "scores.chrf.low (-inf), scores.course.1 (nan)" in caplog.text
