"""`skd doctor`: the same checks as preflight's, where both ask for the same thing, and those of a machine alone."""

from __future__ import annotations

import io
import os
import threading
from pathlib import Path

import pytest
from rich.console import Console

from skd_lib._core.machine import total_memory, usable_cores
from skd_lib.preflight.checks import Check, Checks, Level, table
from skd_lib.preflight.machine import SERVICE_SECONDS, check_disk, check_packages, check_service, examine
from tests.support import http


def test_machine():
    assert 1 <= usable_cores() <= (os.cpu_count() or 1)
    assert 2**28 < total_memory() < 2**50


def test_report_of_this_machine(tmp_path: Path):
    checks = examine(tmp_path / "runs" / "deep", "")
    found = {check.name: check for check in checks}
    names = {"python", "precision", "GPU", "cores", "memory", "disk", "tracking", "package index"}
    assert names <= found.keys()
    assert found["disk"].level in ("ok", "warning")
    assert found["tracking"].level == "warning"
    assert not (tmp_path / "runs").exists()
    screen = io.StringIO()
    Console(file=screen, width=200).print(table("This machine", checks))
    assert "python" in screen.getvalue()
    for check in checks:
        assert check.level == "ok" or check.hint, check


@pytest.mark.parametrize(
    ("requirements", "level", "found"),
    [
        (["pydantic>=2"], "ok", "pydantic 2"),
        (["pydantic<2"], "error", "is outside <2"),
        (["no-such-package-anywhere>=1"], "error", "no-such-package-anywhere is missing"),
    ],
)
def test_packages_against_their_ranges(requirements: list[str], level: Level, found: str):
    checks = Checks()
    check_packages(checks, [f'{each}; extra == "tracking"' for each in requirements])
    (check,) = [each for each in checks.found if each.name == "packages: tracking"]
    assert check.level == level
    assert found in check.what
    assert ("[tracking]" in check.hint) == (level == "error")
    check_packages(checks, requirements)
    base = [each for each in checks.found if each.name == "packages: base"][-1]
    assert (base.level, base.what) == (level, check.what)


def test_tracking_server_that_is_down_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://127.0.0.1:9")
    (check,) = [each for each in examine(tmp_path, "http://127.0.0.1:9") if each.name == "tracking"]
    assert check.level == "error"
    assert "does not answer" in check.what
    assert check.hint


@pytest.mark.parametrize(
    ("url", "level", "found"),
    [
        ("http://127.0.0.1:9", "warning", "http://127.0.0.1:9 does not answer: [Errno 111] Connection refused; token"),
        ("not a URL", "warning", "does not answer: unknown url type"),
        (None, "ok", "answers; token"),
    ],
)
def test_a_service_is_asked_whether_it_answers(url: str | None, level: Level, found: str):
    checks = Checks()
    with http.Server(http.Handler) as server:  # which answers 501
        check_service(checks, "hub", url or server.url, "token")
    (check,) = checks.found
    assert check.level == level
    assert found in check.what


def test_services_are_asked_at_the_same_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    both_asked = threading.Barrier(2, timeout=SERVICE_SECONDS / 2)

    class AnswersBoth(http.Handler):
        def do_GET(self) -> None:
            try:
                both_asked.wait()
            except threading.BrokenBarrierError:
                return  # no answer: an error for the one who asks
            self.send_response(404)
            self.end_headers()

    with http.Server(AnswersBoth) as server:
        for name in ("STORAGE_EMULATOR_HOST", "HF_ENDPOINT"):
            monkeypatch.setenv(name, server.url)
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")
        checks = examine(tmp_path, "")
    found = [check for check in checks if check.name in ("Google Cloud Storage", "Hugging Face hub")]
    assert [(check.name, check.level) for check in found] == [
        ("Google Cloud Storage", "ok"),
        ("Hugging Face hub", "ok"),
    ]


def test_unwritable_folder_is_a_failure(tmp_path: Path):
    if os.geteuid() == 0:
        pytest.skip("root can write everywhere")
    tmp_path.chmod(0o500)
    checks = Checks()
    check_disk(checks, tmp_path / "runs")
    assert checks.found[0].level == "error"


def test_hints_are_shown_beneath_what_was_found():
    screen = io.StringIO()
    Console(file=screen, width=80).print(table("", [Check("disk", "warning", "1 GiB", hint="make room")]))
    lines = [line.split() for line in screen.getvalue().splitlines()]
    place = next(number for number, words in enumerate(lines) if "disk" in words)
    assert {"!", "disk", "1", "GiB"} <= set(lines[place])
    assert {"hint:", "make", "room"} <= set(lines[place + 1])
