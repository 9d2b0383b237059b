"""Progress on standard error, in a log and at a terminal."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from skd_lib._core import terminal


def test_progress_in_a_log(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 5.0, 16.0, 16.0, 20.0, 40.0, 40.0])
    monkeypatch.setattr(terminal, "time", SimpleNamespace(monotonic=lambda: next(now)))
    with terminal.progress_bar("decoding") as tell:
        for done in (1, 2, 3, 4):
            tell(done, 9)
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == ["decoding ...", "decoding 2/9", "decoding 4/9"]


def test_progress_at_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    with terminal.progress_bar("decoding", "looking at the models") as tell:
        tell(1, 4)
        tell(2, 4)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "50%" in captured.err
    assert "decoding" in captured.err
