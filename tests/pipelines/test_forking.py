"""Steps as forks behave as steps that are new interpreters."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from skd_kfp.pipelines.local import forking
from skd_kfp.pipelines.local import runner as local
from skd_kfp.pipelines.local.forking import ForkServer, can_fork
from skd_kfp.pipelines.local.process import Outcome, watch
from skd_lib import __version__
from skd_lib._core import events
from tests.pipelines.test_local import is_alive, wait_until

ROOT = str(Path(__file__).parents[2])
MODULE = "tests.pipelines.forked"

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux has what forks need")


def environment(**further: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": ROOT, "PYTHONUNBUFFERED": "1", events.ENV: "1", **further}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkServer]:
    log = tmp_path_factory.mktemp("forking") / "log"
    with ForkServer(environment(), log) as started:
        yield started
    assert "Traceback" not in log.read_text()


def run(server: ForkServer, tmp_path: Path, *arguments: str, **env: str) -> tuple[Outcome, str]:
    child = server.start(MODULE, arguments, environment(**env))
    assert child is not None
    log = tmp_path / "step.log"
    outcome = watch(child, log=log, on_event=lambda event: None)
    return outcome, log.read_text()


def test_a_fork_has_its_own_arguments_environment_session_and_output(server: ForkServer, tmp_path: Path):
    for value in ("first", "second"):
        outcome, output = run(server, tmp_path, "look", value, ONLY_HERE=value)
        assert outcome == Outcome(0, "", outcome.tail)
        *_, complaint, text = output.splitlines()
        assert complaint == "to standard error"
        seen = json.loads(text)
        assert seen["argv"] == ["look", value]
        assert environment(ONLY_HERE=value).items() <= seen["env"].items()
        assert seen["session"] == seen["pid"] != os.getsid(0)
        assert seen["left"] is None  # by the fork before


def test_a_signal_to_all_processes_of_a_service_ends_steps_but_not_the_server(server: ForkServer, tmp_path: Path):
    def end(event: dict[str, Any]) -> None:
        os.kill(server._process.pid, signal.SIGTERM)
        os.kill(event["pids"][0], signal.SIGTERM)
        os.kill(event["pids"][1], signal.SIGTERM)

    child = server.start(MODULE, ["hang"], environment())
    assert child is not None
    assert watch(child, log=tmp_path / "log", on_event=end).code == -signal.SIGTERM
    assert run(server, tmp_path, "look")[0].code == 0


def test_everything_that_should_have_been_imported_has_been(server: ForkServer, tmp_path: Path):
    modules = json.loads(run(server, tmp_path, "look")[1].splitlines()[-1])["modules"]
    assert set(forking.IMPORTED) <= set(modules)


@pytest.mark.parametrize(
    ("behaviour", "code", "last"),
    [
        ("leave", 7, ""),
        ("complain", 1, "the data has a hole"),
        ("crash", 1, "RuntimeError: boom"),
        ("be killed", -signal.SIGKILL, ""),
        ("linger", 0, "and the end"),
        ("compute", 0, "700"),
    ],
)
def test_a_fork_ends_as_an_interpreter_does(server: ForkServer, tmp_path: Path, behaviour: str, code: int, last: str):
    outcome, output = run(server, tmp_path, behaviour)
    assert outcome.code == code
    assert output.splitlines()[-1:] == ([last] if last else [])
    if behaviour == "linger":
        assert output.splitlines() == ["first the thread", "and the end"]


def test_a_module_that_is_not_there(server: ForkServer, tmp_path: Path):
    child = server.start("skd_lib.steps.nothing", [], environment())
    assert child is not None
    outcome = watch(child, log=tmp_path / "log", on_event=lambda event: None)
    assert outcome.code == 1
    assert "No module named skd_lib.steps.nothing" in outcome.explain()


def test_interruption_stops_a_fork_and_its_children(server: ForkServer, tmp_path: Path):
    pids: list[int] = []

    def interrupt(event: dict[str, Any]) -> None:
        pids.extend(event["pids"])
        raise KeyboardInterrupt

    child = server.start(MODULE, ["hang"], environment())
    assert child is not None
    with pytest.raises(KeyboardInterrupt):
        watch(child, log=tmp_path / "log", on_event=interrupt)
    wait_until(lambda: not any(map(is_alive, pids)))
    assert run(server, tmp_path, "leave")[0].code == 7  # the server goes on


def test_a_fork_dies_with_its_server_which_then_starts_no_more(tmp_path: Path):
    with ForkServer(environment(), tmp_path / "log", imported=[]) as server:
        pids: list[int] = []

        def kill_the_server(event: dict[str, Any]) -> None:
            pids.extend(event["pids"])
            server._process.kill()
            os.kill(pids[1], signal.SIGKILL)  # the fork's child: nobody else ends it, and it holds the output open

        child = server.start(MODULE, ["hang"], environment())
        assert child is not None
        outcome = watch(child, log=tmp_path / "step.log", on_event=kill_the_server)
        assert outcome.code == -signal.SIGKILL
        wait_until(lambda: not is_alive(pids[0]))
        assert server.start(MODULE, ["leave"], environment()) is None


def test_steps_are_new_interpreters_where_there_is_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(forking, "_GPUS", (str(tmp_path),))
    assert not can_fork()
    assert a_step(tmp_path).code == 0
    assert not (tmp_path / "log").exists()


def test_steps_are_new_interpreters_where_the_server_has_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    class Ended(ForkServer):
        def __init__(self, env: Mapping[str, str], log: Path) -> None:
            super().__init__(env, log, imported=[])
            self._process.kill()

    monkeypatch.setattr(local, "ForkServer", Ended)
    assert a_step(tmp_path).code == 0
    assert (tmp_path / "log").exists()


def test_what_lies_where_a_run_is_started_is_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(local, "ForkServer", partial(ForkServer, imported=["datasets"]))
    for name in ("datasets.py", "pipelines/__init__.py", "skd_lib/__init__.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("raise RuntimeError('the wrong one')")
    assert a_step(tmp_path).code == 0
    assert "the wrong one" not in (tmp_path / "log").read_text()


def test_a_step_knows_which_sources_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def known() -> str:
        with local.child_processes({}, tmp_path / "log") as start:
            command = ["python3", "-c", "import os; print(os.environ['SKD_CODE_VERSION'])"]
            assert start("image", command, {}, tmp_path / "step.log", lambda event: None).code == 0
        return (tmp_path / "step.log").read_text().splitlines()[-1]

    monkeypatch.delenv("SKD_CODE_VERSION", raising=False)
    assert known() == f"{__version__}, sources {local.source_digest()[:16]}"
    monkeypatch.setenv("SKD_CODE_VERSION", "git 1234567")
    assert known() == "git 1234567"


def a_step(tmp_path: Path) -> Outcome:
    with local.child_processes({}, tmp_path / "log") as start:
        command = ["python3", "-m", "skd_lib.steps.show", "--help"]
        return start("image", command, {}, tmp_path / "step.log", lambda event: None)
