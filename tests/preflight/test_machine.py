from __future__ import annotations

import io
import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from rich.console import Console

from skd_lib._core.machine import total_memory, usable_cores
from skd_lib.preflight import machine
from skd_lib.preflight.machine import Finding, Grade


def test_machine():
    assert 1 <= usable_cores() <= (os.cpu_count() or 1)
    assert 2**28 < total_memory() < 2**50


def test_report_of_this_machine(tmp_path: Path):
    findings = machine.examine(tmp_path / "runs" / "deep", "")
    found = {finding.what: finding for finding in findings}
    assert {
        "python",
        "GPU" if "GPU" in found else "GPU 0",
        "cores",
        "memory",
        "disk",
        "MLflow",
        "package index",
    } <= found.keys()
    assert found["disk"].grade in (Grade.OK, Grade.WARN)
    assert found["MLflow"].grade is Grade.WARN
    assert not (tmp_path / "runs").exists()
    screen = io.StringIO()
    Console(file=screen, width=200).print(machine.render(findings))
    assert "python" in screen.getvalue()
    for finding in findings:
        assert finding.grade is Grade.OK or finding.advice, finding


@pytest.mark.parametrize(
    ("requirements", "grade", "found"),
    [
        (["pydantic>=2"], Grade.OK, "pydantic 2"),
        (["pydantic<2"], Grade.FAIL, "is outside <2"),
        (["no-such-package-anywhere>=1"], Grade.FAIL, "no-such-package-anywhere is missing"),
    ],
)
def test_packages_against_their_ranges(requirements: list[str], grade: Grade, found: str):
    finding = machine._group("tracking", [Requirement(text) for text in requirements])
    assert finding.grade is grade
    assert found in finding.found
    assert ("[tracking]" in finding.advice) == (grade is Grade.FAIL)


def test_tracking_server_that_is_down_is_a_failure():
    finding = machine._tracking("http://127.0.0.1:9")
    assert finding.grade is Grade.FAIL
    assert finding.advice


@pytest.mark.parametrize(
    ("url", "grade", "found"),
    [
        ("http://127.0.0.1:9", Grade.WARN, "http://127.0.0.1:9 does not answer: [Errno 111] Connection refused; token"),
        ("not a URL", Grade.WARN, "does not answer: unknown url type"),
        (None, Grade.OK, "answers; token"),
    ],
)
def test_a_service_is_asked_whether_it_answers(url: str | None, grade: Grade, found: str):
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:  # which answers 501
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        finding = machine._service("hub", url or f"http://127.0.0.1:{server.server_port}", "token")
        server.shutdown()
    assert finding.grade is grade
    assert found in finding.found


def test_unwritable_folder_is_a_failure(tmp_path: Path):
    if os.geteuid() == 0:
        pytest.skip("root can write everywhere")
    tmp_path.chmod(0o500)
    assert machine._disk(tmp_path / "runs").grade is Grade.FAIL


def test_advice_is_shown_beneath_what_was_found():
    screen = io.StringIO()
    Console(file=screen, width=80).print(machine.render([Finding("disk", Grade.WARN, "1 GiB", "make room")]))
    assert screen.getvalue().split() == ["warn", "disk", "1", "GiB", "make", "room"]
