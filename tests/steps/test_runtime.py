"""What every step shares: KFP's executor output, and how a step fails."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from skd_lib._core import events
from skd_lib.steps.kfp_call import Call, called, take_call
from skd_lib.steps.runtime import StepIO


def words(folder: Path) -> list[str]:
    """A step's own options, and what follows them where no path tells of a URI."""
    return [
        *("--seed", "3"),
        *("--kfp-artifact", "student=gs://bucket/a=b/student", "--kfp-artifact", "figures=gs://bucket/figures"),
        *("--kfp-parameters", f"course,why={folder / 'kfp' / 'course'}"),
        *("--kfp-input", "teacher=gs://bucket/t"),
    ]


@pytest.fixture
def in_pod(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KFP_POD_NAME", "step-pod")


def test_what_kfp_says_is_taken_off_the_command_line(tmp_path: Path) -> None:
    own, call = take_call(words(tmp_path))
    assert own == ["--seed", "3"]
    assert call.output_file is None
    assert call.artifacts == {"student": "gs://bucket/a=b/student", "figures": "gs://bucket/figures"}
    assert call.inputs == {"teacher": "gs://bucket/t"}
    assert take_call(call.words()) == ([], call)
    assert take_call(["--seed", "3"]) == (["--seed", "3"], Call())


@pytest.mark.usefixtures("in_pod")
def test_every_output_artifact_is_listed_with_its_remote_uri(tmp_path: Path) -> None:
    """In a pod the executor output lies beside the artifacts, and each parameter in its own file too."""
    paths = {"student": tmp_path / "task" / "student", "figures": tmp_path / "task" / "figures"}
    with called(take_call(words(tmp_path))[1]):
        io = StepIO(paths)
    io.metrics("figures", {"chrf": 2})
    io.parameter("course", {"steps": [1, 2]})
    io.parameter("why", 'no "gain"')
    assert io.write() == tmp_path / "task" / "output_metadata.json"
    written = json.loads((tmp_path / "task" / "output_metadata.json").read_text())
    assert {name: value["artifacts"][0]["uri"] for name, value in written["artifacts"].items()} == {
        "student": "gs://bucket/a=b/student",
        "figures": "gs://bucket/figures",
    }
    student = {"name": "student", "uri": "gs://bucket/a=b/student", "metadata": {}}
    assert written["artifacts"]["student"]["artifacts"] == [student]
    figures = written["artifacts"]["figures"]["artifacts"][0]
    assert (figures["metadata"], figures["type"]["schemaTitle"]) == ({"chrf": 2}, "system.Metrics")
    assert written["parameterValues"] == {"course": {"steps": [1, 2]}, "why": 'no "gain"'}
    assert json.loads((tmp_path / "kfp" / "course").read_text()) == {"steps": [1, 2]}
    assert (tmp_path / "kfp" / "why").read_text() == 'no "gain"'
    assert io.input_uri("teacher", tmp_path) == "gs://bucket/t"


@pytest.mark.parametrize(
    ("path", "uri"),
    [
        ("/gcs/bucket/v2/run/task/student", "gs://bucket/v2/run/task/student"),
        ("/minio/mlpipeline/a/student", "minio://mlpipeline/a/student"),
        ("/s3/bucket/student", "s3://bucket/student"),
        ("/home/somebody/student", "/home/somebody/student"),
    ],
)
def test_the_uri_of_an_artifact_follows_from_its_path_in_a_pod(
    monkeypatch: pytest.MonkeyPatch, path: str, uri: str
) -> None:
    """`LocalPathForURI` of backend/src/v2/component/launcher_v2.go, KFP 2.15 to 2.17; by hand a path is a path."""
    assert Call().uri(Path(path)) == path
    assert Call(output_file=Path("x")).uri(Path(path)) == path
    monkeypatch.setenv("KFP_POD_NAME", "step-pod")
    assert Call().uri(Path(path)) == uri


@pytest.mark.usefixtures("in_pod")
def test_a_task_without_artifacts_has_its_parameters_files_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with called(take_call(words(tmp_path))[1]):
        io = StepIO({})
    io.parameter("why", "no gain")
    assert io.write() is None
    assert [path.relative_to(tmp_path) for path in tmp_path.rglob("*")] == [Path("kfp"), Path("kfp/why")]


def test_kfp_local_names_the_executor_output(tmp_path: Path) -> None:
    file = tmp_path / "task" / "executor_output.json"
    with called(take_call(["--kfp-output-file", str(file)])[1]):
        assert StepIO({"student": tmp_path / "task" / "student"}).write() == file


def test_lists_of_inputs_are_where_kfps_launcher_puts_them() -> None:
    uris = ["gs://bucket/a/b", "s3://bucket/c", "/local/d"]
    task = {"inputs": {"artifacts": {"evaluations": {"artifacts": [{"uri": uri} for uri in uris]}}}}
    with called(take_call(["--kfp-executor-input", json.dumps(task)])[1]):
        paths = StepIO({}).input_paths("evaluations")
    assert paths == [Path("/gcs/bucket/a/b"), Path("/s3/bucket/c"), Path("/local/d")]
    assert StepIO({}).input_paths("evaluations") == []


def test_by_hand_the_output_lies_beside_the_first_artifact(tmp_path: Path) -> None:
    io = StepIO({"model": tmp_path / "model"})
    path = io.write()
    assert path == tmp_path / "executor_output.json"
    assert json.loads(path.read_text())["artifacts"]["model"]["artifacts"][0]["uri"] == str(tmp_path / "model")
    assert io.input_uri("teacher", tmp_path / "t") == str(tmp_path / "t")


STEP = """
import sys
from skd_lib.errors import SkdError
from skd_lib.steps.runtime import run_step

def main(seed: int = 0) -> None:
    raise {error}

run_step(main)
"""


def run(error: str, tmp_path: Path, **env: str) -> subprocess.CompletedProcess[str]:
    script = tmp_path / "step.py"
    script.write_text(STEP.format(error=error))
    root = str(Path(__file__).parents[2])
    return subprocess.run(
        [sys.executable, str(script), *words(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        env={"PYTHONPATH": root, **env},
    )


def test_what_the_user_can_mend_is_a_sentence_and_exit_code_2(tmp_path: Path) -> None:
    done = run("SkdError('broken', where='data.jsonl, row 3', hint='mend it')", tmp_path)
    assert done.returncode == 2
    assert "error: data.jsonl, row 3: broken\n  hint: mend it" in done.stderr
    assert "Traceback" not in done.stderr


def test_libraries_do_not_warn_of_what_no_step_asks_for(tmp_path: Path) -> None:
    warn = "__import__('logging').getLogger('bitsandbytes.backends.cpu.ops').warning('no kernels')"
    done = run(f"SkdError(str({warn}))", tmp_path)
    assert done.returncode == 2
    assert "no kernels" not in done.stderr


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
    io = StepIO({"metrics": tmp_path / "metrics"})
    io.metrics("metrics", {"loss": math.nan, "chrf": 1.5})
    io.parameter("scores", {"chrf": {"score": 1.5, "low": -math.inf}, "course": [1.0, math.nan]})
    path = io.write()
    assert path is not None
    written = path.read_text()
    assert "NaN" not in written
    assert "Infinity" not in written
    output = json.loads(written)
    assert output["artifacts"]["metrics"]["artifacts"][0]["metadata"] == {"chrf": 1.5}
    assert output["parameterValues"] == {"scores": {"chrf": {"score": 1.5}, "course": [1.0, None]}}
    assert "of metrics: loss (nan)" in caplog.text
    assert "scores.chrf.low (-inf), scores.course.1 (nan)" in caplog.text
