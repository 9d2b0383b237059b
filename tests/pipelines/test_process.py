from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

from skd_kfp.pipelines.local.process import Outcome, run_logged


def run(tmp_path: Path, code: str) -> tuple[Outcome, list[dict[str, Any]], str]:
    seen: list[dict[str, Any]] = []
    log = tmp_path / "step.log"
    outcome = run_logged([sys.executable, "-c", code], log=log, env=os.environ, on_event=seen.append)
    return outcome, seen, log.read_text()


def test_output_of_both_streams_goes_to_the_log_and_events_to_the_watcher(tmp_path: Path):
    code = """
import sys
print("out"); print("err", file=sys.stderr, flush=True)
print('::skd {"event": "progress", "what": "training", "done": 1, "total": 2, "figures": {}}')
print("::skd {broken")
"""
    outcome, seen, log = run(tmp_path, code)
    assert outcome.code == 0
    assert [event["done"] for event in seen] == [1]
    assert {"out", "err", "training 1/2", "::skd {broken"} == set(log.splitlines())


def test_own_error_sentence_wins(tmp_path: Path):
    outcome, _, _ = run(
        tmp_path, """print('::skd {"event": "error", "message": "no such file"}'); raise SystemExit(2)"""
    )
    assert (outcome.code, outcome.explain()) == (2, "no such file")


def test_crash_is_explained_by_the_last_lines(tmp_path: Path):
    outcome, _, _ = run(tmp_path, "for i in range(100): print(i)\n1 / 0")
    assert outcome.explain().splitlines()[-1] == "ZeroDivisionError: division by zero"
    assert len(outcome.tail) == 15


def test_out_of_memory_kill_is_named(tmp_path: Path):
    outcome, _, _ = run(tmp_path, "import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    assert outcome.explain() == "the process was ended by SIGKILL: the machine may have run out of memory"


def test_bytes_that_are_no_text_do_not_stop_the_run(tmp_path: Path):
    outcome, _, log = run(tmp_path, r"import sys; sys.stdout.buffer.write(b'caf\xe9\n')")
    assert outcome.code == 0
    assert log == "caf\N{REPLACEMENT CHARACTER}\n"


def test_interruption_stops_the_child_before_it_goes_on(tmp_path: Path):
    pids: list[int] = []

    def interrupt(event: dict[str, Any]) -> None:
        pids.append(event["pid"])
        raise KeyboardInterrupt

    code = """
import json, os, time
print("::skd " + json.dumps({"event": "pid", "pid": os.getpid()}), flush=True)
time.sleep(60)
"""
    with pytest.raises(KeyboardInterrupt):
        run_logged([sys.executable, "-c", code], log=tmp_path / "log", env=os.environ, on_event=interrupt)
    with pytest.raises(ProcessLookupError):
        os.kill(pids[0], 0)
