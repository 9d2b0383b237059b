from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import typer
from rich.console import Console

import skd_lib
from skd_kfp.pipelines.local import kfp_patch as kfp_local
from skd_kfp.pipelines.local import stopping
from skd_kfp.pipelines.local.folder import RunFolder
from skd_kfp.pipelines.local.progress import Display, LiveDisplay
from skd_kfp.pipelines.local.reuse import local_pipeline, run_identity, source_digest
from skd_kfp.pipelines.local.runner import LocalRun, StepFailed, child_processes, run_pipeline
from skd_lib.config import RunConfig
from skd_lib.errors import SkdError
from tests.pipelines.fakes import fake_pipeline

PROMPT = """it's '{"a": "{source}"}' $(HOME) \\ """


def config(**changes: Any) -> RunConfig:
    values = {
        "name": "fake",
        "teacher": "teacher",
        "student": "student",
        "task": {"prompt": PROMPT.replace("{", "{{").replace("}", "}}").replace("{{source}}", "{source}")},
        "data": {"source": {"type": "files", "train": ["x.jsonl"]}},
    }
    return RunConfig.model_validate({**values, **changes})


@pytest.fixture
def journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "journal"
    path.touch()
    monkeypatch.setenv("FAKE_STEP_JOURNAL", str(path))
    return path


def executed(journal: Path) -> list[str]:
    return [line.split()[0] for line in journal.read_text().splitlines()]


def run(folder: Path, run_config: RunConfig | None = None, **options: Any) -> tuple[LocalRun, str]:
    screen = io.StringIO()
    behaviours = {k: options.pop(k) for k in ("first_does", "second_does") if k in options}
    documents = options.pop("documents", None) or fake_pipeline(folder, **behaviours)
    finished = run_pipeline(
        run_config or config(),
        RunFolder.create(folder / "runs", "fake"),
        documents,
        Display(Console(file=screen, width=200), 4),
        experiment="skd",
        **{"tracking_uri": "", **options},
    )
    return finished, screen.getvalue()


def test_runs_every_step_and_keeps_what_they_wrote(tmp_path: Path, journal: Path, capfd: pytest.CaptureFixture[str]):
    finished, screen = run(tmp_path)
    assert executed(journal) == ["first", "second", "second", "last"]
    assert finished.outputs["make"]["result"] == {"value": "teacher", "nested": [1, 2.5]}
    assert Path(finished.outputs["make"]["model"]).read_text() == "first:teacher"
    # Quotes survive every layer of quoting.
    assert json.loads(finished.outputs["use"]["summary"]["value"])["task"]["prompt"] == config().task.prompt
    assert list(finished.durations()) == ["make", "report", "use", "finish"]
    assert all(seconds > 0 for seconds in finished.durations().values())
    assert "hello from first" in (tmp_path / "runs/fake/logs/make.log").read_text()
    assert "working 1/3 loss=1" in (tmp_path / "runs/fake/logs/make.log").read_text()
    assert "::skd" not in (tmp_path / "runs/fake/logs/make.log").read_text()
    assert "[4/4] finish: done" in screen
    assert capfd.readouterr() == ("", "")  # kfp's own chatter goes to its log
    assert "Executing task" in (tmp_path / "runs/fake/logs/kfp.log").read_text()


def test_second_run_reuses_cached_steps_with_their_original_seconds(tmp_path: Path, journal: Path):
    before, _ = run(tmp_path)
    after, screen = run(tmp_path)
    assert executed(journal)[4:] == ["second", "last"]  # the uncached ones
    assert after.reused_steps == {"make", "use"}
    assert after.taken["make"] == before.taken["make"]
    assert after.outputs["make"] == before.outputs["make"]
    assert "make: unchanged, reused" in screen


@pytest.mark.slow
def test_changed_parameter_runs_what_depends_on_it(tmp_path: Path, journal: Path):
    run(tmp_path)
    run(tmp_path, config(seed=1))  # which is in `config`
    assert executed(journal)[4:] == ["second", "second", "last"]
    run(tmp_path, config(teacher="another"))
    assert executed(journal)[7:] == ["first", "second", "second", "last"]


@pytest.mark.slow
def test_run_id_lasts_while_the_configuration_does(tmp_path: Path, journal: Path):
    run(tmp_path)
    run(tmp_path)
    run(tmp_path, config(seed=1))
    run(tmp_path, config(seed=1), fresh=True)
    ids = [line.split()[2] for line in journal.read_text().splitlines() if line.startswith("last")]
    assert ids[0] == ids[1]
    assert len(set(ids)) == 3
    assert executed(journal)[-4:] == ["first", "second", "second", "last"]  # fresh runs everything


def test_run_id_lasts_while_data_models_and_code_do(tmp_path: Path):
    for name in ("teacher", "student", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    (tmp_path / "x.jsonl").write_text("{}")
    source = {"type": "files", "train": [str(tmp_path / "x.jsonl")]}
    wanted = config(teacher=str(tmp_path / "teacher"), student=str(tmp_path / "student"), data={"source": source})
    trials = [{"variant": "a", "seed": 0, "overrides": {"student": str(tmp_path / "other")}}]
    folder = RunFolder.create(tmp_path / "runs", "fake")

    def run_id(code: str = "code") -> str:
        spec = {"deploymentSpec": {"executors": {"step": {"container": {"image": code}}}}}
        return folder.run_id(wanted, run_identity(wanted, spec, trials), fresh=False)

    ids = [run_id()]
    for change in ("teacher/README.md", "teacher/config.json", "student/config.json", "other/config.json", "x.jsonl"):
        (tmp_path / change).write_text('{"another": 1}')
        ids += [run_id(), run_id()]
    (tmp_path / "teacher").rename(tmp_path / "away")  # cannot be looked at: nothing is known to have changed
    ids.append(run_id())
    (tmp_path / "away").rename(tmp_path / "teacher")
    ids += [run_id(), run_id("other code")]
    numbers = {text: number for number, text in enumerate(dict.fromkeys(ids))}
    assert [numbers[text] for text in ids] == [0, 0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 4, 4, 5]


def test_failed_step_stops_the_run_with_its_own_sentence(tmp_path: Path, journal: Path):
    with pytest.raises(StepFailed) as failure:
        run(tmp_path, first_does="error")
    assert executed(journal) == ["first", "last"]  # no retry, nothing else, but the exit handler
    assert str(failure.value).startswith("step make: the data has an empty row\n  hint: correct row 3")
    assert str(tmp_path / "runs/fake/logs/make.log") in str(failure.value)
    assert failure.value.__cause__ is None


def test_nothing_independent_starts_after_a_failure(tmp_path: Path, journal: Path):
    with pytest.raises(StepFailed, match="step report"):
        run(tmp_path, second_does="crash")
    assert executed(journal) == ["first", "second", "last"]


def test_crash_shows_the_end_of_the_log(tmp_path: Path, journal: Path):
    with pytest.raises(StepFailed, match="exit code 1") as failure:
        run(tmp_path, first_does="crash")
    assert "RuntimeError: boom" in str(failure.value)


def test_failure_then_success_goes_on_from_the_finished_step(tmp_path: Path, journal: Path):
    with pytest.raises(StepFailed):
        run(tmp_path, second_does="error")
    run(tmp_path)
    assert executed(journal) == ["first", "second", "last", "second", "second", "last"]


def test_link_follows_the_last_run(tmp_path: Path):
    folder = RunFolder.create(tmp_path / "runs", "fake")
    for name in ("a", "b"):
        (folder.artifacts / name).mkdir()
        assert folder.link("student", folder.artifacts / name) == folder.root / "student"
    assert (folder.root / "student").resolve() == folder.artifacts / "b"
    assert not (folder.root / "student").readlink().is_absolute()  # the folder can be moved


@pytest.mark.slow
def test_two_runs_of_one_folder(tmp_path: Path, journal: Path):
    with (
        RunFolder.create(tmp_path / "runs", "fake").locked(),
        pytest.raises(SkdError, match="another `skd run` or `skd compare` is using this folder"),
    ):
        run(tmp_path)
    run(tmp_path)


def test_unwritable_folder(tmp_path: Path):
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(SkdError, match="cannot write the run's folder"):
        RunFolder.create(tmp_path / "runs", "fake")


def test_steps_get_the_cores_unless_told_otherwise(tmp_path: Path, journal: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("OMP_NUM_THREADS")
    run(tmp_path)
    assert {line.split()[3] for line in journal.read_text().splitlines()} == {str(len(os.sched_getaffinity(0)))}


def test_changed_code_changes_every_cache_key(tmp_path: Path):
    local = local_pipeline(fake_pipeline(tmp_path))
    images = {executor["container"]["image"] for executor in local[0]["deploymentSpec"]["executors"].values()}
    assert images == {f"local-python/skd:{source_digest()[:16]}"}
    assert "retryPolicy" not in json.dumps(local)


def test_what_lies_where_a_run_is_started_is_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    for name in ("datasets.py", "pipelines/__init__.py", "skd_lib/__init__.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("raise RuntimeError('the wrong one')")
    command = ["python3", "-m", "skd_lib.steps.show", "--help"]
    assert child_processes({})("image", command, {}, tmp_path / "log", lambda event: None).code == 0


def test_a_step_knows_which_sources_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def known() -> str:
        command = ["python3", "-c", "import os; print(os.environ['SKD_CODE_VERSION'])"]
        assert child_processes({})("image", command, {}, tmp_path / "log", lambda event: None).code == 0
        return (tmp_path / "log").read_text().splitlines()[-1]

    monkeypatch.delenv("SKD_CODE_VERSION", raising=False)
    assert known() == f"{skd_lib.__version__}, sources {source_digest()[:16]}"
    monkeypatch.setenv("SKD_CODE_VERSION", "git 1234567")
    assert known() == "git 1234567"


HANGING_RUN = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of a shell start with it ignored
from pathlib import Path
from tests.pipelines.test_local import run
run(Path(sys.argv[1]), first_does="hang")
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's death signal is Linux's")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_ended_run_leaves_no_child(tmp_path: Path, journal: Path, number: signal.Signals):
    root = Path(__file__).parents[2]
    runner = subprocess.Popen([sys.executable, "-c", HANGING_RUN, str(tmp_path)], cwd=root, stderr=subprocess.DEVNULL)
    log = tmp_path / "runs/fake/logs/make.log"
    wait_until(lambda: log.is_file() and "hanging" in log.read_text())
    child = int(journal.read_text().split()[1])
    assert is_alive(child)
    runner.send_signal(number)
    assert runner.wait(60) != 0
    wait_until(lambda: not is_alive(child))
    run(tmp_path)  # the lock is free, and the run goes on


STOPPABLE_RUN = """
import sys, typer
from pathlib import Path
from skd_kfp.pipelines.local.stopping import explain_end
from tests.pipelines.test_local import run
try:
    with explain_end("skd run 'my run.yaml'"):
        run(Path(sys.argv[1]), first_does=sys.argv[2])
except typer.Exit as end:
    sys.exit(end.exit_code)
"""


def started(folder: Path, behaviour: str, *, ignored: signal.Signals | None = None) -> subprocess.Popen[str]:
    (folder / "temporary").mkdir()
    runner = subprocess.Popen(
        [sys.executable, "-c", STOPPABLE_RUN, str(folder), behaviour],
        cwd=Path(__file__).parents[2],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(folder / "temporary")},
        preexec_fn=(lambda: signal.signal(ignored, signal.SIG_IGN)) if ignored else None,
    )
    log = folder / "runs/fake/logs/make.log"
    wait_until(lambda: log.is_file() and "hanging" in log.read_text())
    return runner


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "ignored", "code"),
    [(signal.SIGTERM, signal.SIGINT, 75), (signal.SIGINT, None, 130)],
)
def test_a_signal_lets_the_step_save_and_leaves_nothing(
    tmp_path: Path, journal: Path, number: signal.Signals, ignored: signal.Signals | None, code: int
):
    runner = started(tmp_path, "save", ignored=ignored)
    runner.send_signal(number)
    _, errors = runner.communicate(timeout=60)
    assert (tmp_path / "saved").exists()
    assert runner.returncode == code, errors
    assert f"stopped by {number.name}. Finished steps and checkpoints are kept: `skd run 'my run.yaml'`" in errors
    assert (tmp_path / "runs/fake/logs/make.log").read_text().count("saving") == 50_000
    assert not list((tmp_path / "temporary").iterdir())
    assert not is_alive(int(journal.read_text().split()[1]))
    assert executed(journal) == ["first"]


@pytest.mark.slow
def test_a_second_signal_ends_a_run_at_once(tmp_path: Path, journal: Path):
    runner = started(tmp_path, "refuse")
    runner.send_signal(signal.SIGTERM)
    log = tmp_path / "runs/fake/logs/make.log"
    wait_until(lambda: "refusing" in log.read_text())
    assert runner.poll() is None
    runner.send_signal(signal.SIGTERM)
    runner.communicate(timeout=60)
    assert runner.returncode == 75
    assert not is_alive(int(journal.read_text().split()[1]))
    assert not list((tmp_path / "temporary").iterdir())


@pytest.mark.slow
def test_a_signal_that_python_lost_ends_the_run_at_the_next_step(tmp_path: Path, journal: Path):
    with stopping.stoppable():
        with contextlib.suppress(stopping.Stopped):  # as a destructor would
            signal.raise_signal(signal.SIGHUP)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path)
    assert executed(journal) == []
    run(tmp_path)


@pytest.mark.slow
def test_a_full_disk_is_a_sentence_and_the_next_run_goes_on(tmp_path: Path, journal: Path):
    logs = RunFolder.create(tmp_path / "runs", "fake").logs
    for name in ("make.log", "kfp.log", "finish.log"):
        (logs / name).symlink_to("/dev/full")
    with pytest.raises(StepFailed) as failure:
        run(tmp_path)
    assert f"step make: {logs}/make.log: cannot be written: No space left on device" in str(failure.value)
    assert "free some space there" in str(failure.value)
    for link in logs.iterdir():
        link.unlink()
    run(tmp_path)
    assert executed(journal)[-4:] == ["first", "second", "second", "last"]


def test_a_full_disk_outside_of_steps_is_a_sentence(tmp_path: Path, journal: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/runs/fake/artifacts")

    monkeypatch.setattr(kfp_local, "run_locally", full)
    with pytest.raises(SkdError) as failure:
        run(tmp_path)
    assert str(failure.value).startswith("/runs/fake/artifacts: cannot be written: No space left on device")
    assert "run the same command again" in failure.value.hint


@pytest.mark.parametrize(("step_ends_with", "code"), [(75, 75), (143, 75), (-15, 75), (2, 1), (-9, 1)])
def test_a_step_that_was_stopped_is_to_be_started_again(step_ends_with: int, code: int):
    with pytest.raises(typer.Exit) as end, stopping.explain_end("skd run x"):
        raise StepFailed("distill", "stopped", Path("log"), step_ends_with)
    assert end.value.exit_code == code


def test_the_command_that_goes_on_has_all_options_but_those_that_start_over(monkeypatch: pytest.MonkeyPatch):
    words = ["run", "my run.yaml", "--fresh", "--set", "seed=3", "--tracking-uri=http://bob:it's/1@host"]
    monkeypatch.setattr(sys, "argv", ["/usr/bin/skd", *words])
    assert stopping.same_command() == "skd run 'my run.yaml' --set seed=3 --tracking-uri=http://host"


@pytest.mark.slow
def test_records_that_mlflow_has_not_taken_are_named_and_sent_by_the_next_run(
    tmp_path: Path, journal: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = RunFolder.create(tmp_path / "runs", "fake")
    records = folder.records
    records.mkdir()
    place = {"tracking_uri": "http://m", "experiment": "e", "pipeline_run_id": "r", "step": "distill", "run_name": None}
    (records / "a.jsonl").write_text(json.dumps({**place, "mlflow_run_id": "", "started": 1}) + "\n")
    asked: list[tuple[str, str]] = []
    monkeypatch.setattr("skd_lib.tracking.outbox.resend", lambda *call: asked.append(call))
    _, screen = run(tmp_path, second_does="note", tracking_uri="http://m", fresh=True)
    assert asked == [(str(records), "http://m")]
    assert f"MLflow has not taken the records of distill, which wait in {records}" in screen
    assert f"`skd track replay {records}/*.jsonl`" in screen
    assert f"note: report: records go to {records}" in screen  # each step leaves its own there
    (records / "a.jsonl").unlink()
    _, screen = run(tmp_path, tracking_uri="http://m")
    assert len(asked) == 1
    assert "has not taken" not in screen


@pytest.mark.slow
def test_what_came_of_a_run_is_kept_for_its_last_line(tmp_path: Path, journal: Path):
    finished, screen = run(tmp_path, second_does="outcome")
    assert finished.outcome == "registered as m version 2 (challenger)"
    assert finished.outcome not in screen


def is_alive(pid: int) -> bool:
    """Whether the process still runs; one that waits to be reaped does not."""
    status = Path(f"/proc/{pid}/status")
    try:
        return "\nState:\tZ" not in status.read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until(condition: Any, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.05)


def test_live_display_shows_steps_and_figures():
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=120)
    with LiveDisplay(console, "demo", 2) as display:
        display.finished("prepare_data", 3.14, reused=True)
        display.started("distill")
        display.progress("distill", {"what": "training", "done": 4, "total": 8, "figures": {"loss": 1.5}})
        display.bars.refresh()
        display.finished("distill", 75, reused=False)
    text = screen.getvalue()
    for shown in ("prepare_data", "reused", "distill: training", "4/8", "loss 1.5", "1 min 15 s"):
        assert shown in text
