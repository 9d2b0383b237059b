"""Servers end with all of their processes, and with the training, without vLLM."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from skd_lib.vllm.serve import end, launch


@pytest.fixture
def vllm(tmp_path: Path) -> Path:
    """A program in the place of vLLM's interpreter, with a process of its own that heeds no SIGTERM."""
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\nsh -c 'trap \"\" TERM; echo $$ > {tmp_path}/engine; sleep 60' &\nwait\n")
    program.chmod(0o755)
    return program


def engine_of(vllm: Path) -> psutil.Process:
    deadline = time.monotonic() + 20
    while not (said := vllm.with_name("engine")).exists() or not said.read_text().strip():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return psutil.Process(int(said.read_text()))


def is_running(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def test_a_server_ends_with_the_processes_that_it_has_started(vllm: Path) -> None:
    process = launch(vllm, ["serve"], {})
    engine = engine_of(vllm)
    end(process)
    engine.wait(10)
    assert process.returncode == -signal.SIGTERM


def test_a_server_ends_with_a_training_that_is_killed_and_not_by_a_signal_to_its_group(vllm: Path) -> None:
    code = (
        "import os, pathlib, signal; from skd_lib.vllm.serve import launch\n"
        f"child = launch(pathlib.Path({str(vllm)!r}), ['serve'], {{}})\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN); os.killpg(0, signal.SIGTERM)\n"
        "print(child.pid, flush=True); signal.pause()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as us:
        assert us.stdout is not None
        server = psutil.Process(int(us.stdout.readline()))
        engine = engine_of(vllm)
        assert is_running(server)
        us.kill()
    server.wait(10)
    engine.kill()
