"""Notifying a channel: against a real HTTP server in this process, which takes messages or is in trouble."""

from __future__ import annotations

import json
import logging
import socket
import threading
from collections.abc import Iterator

import pytest

from skd_lib.steps import notify
from skd_lib.steps.notify import WEBHOOK_VARIABLE, Message
from tests.support import http

SECRET = "T00SECRET"
MESSAGE = Message(
    "demo <1> & co",
    "SUCCEEDED",
    links={"MLflow": "https://mlflow.example/#/runs/1?a=1&b=2"},
    figures={
        "teacher/chrf": 47.0,
        "student_before/chrf": 18.04,
        "student_after/chrf": 32.3,
        "draft_before/speedup": 0.28,
        "draft_after/speedup": 0.31,
    },
)


class Channel(http.Server):
    """Answers with the statuses in `answers`, one after another, then always 200."""

    def __init__(self) -> None:
        super().__init__(_Handler)
        self.answers: list[int] = []
        self.paths: list[str] = []
        self.messages: list[str] = []
        self.silent = threading.Event()

    @property
    def url(self) -> str:
        return f"{super().url}/services/{SECRET}"


class _Handler(http.Handler):
    server: Channel

    def do_POST(self) -> None:
        self.server.paths.append(self.path)
        self.server.messages.append(json.loads(self.rfile.read(int(self.headers["Content-Length"])))["text"])
        if self.server.silent.is_set():
            threading.Event().wait(2)
            return
        self.send_response(self.server.answers.pop(0) if self.server.answers else 200)
        self.send_header("Location", "/elsewhere")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_POST


@pytest.fixture
def channel(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Iterator[Channel]:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setattr(notify, "BACKOFF_SECONDS", 0.01)
    with Channel() as server:
        monkeypatch.setenv(WEBHOOK_VARIABLE, server.url)
        yield server
        assert SECRET not in caplog.text


def test_message(channel: Channel):
    assert notify.notify(MESSAGE)
    assert channel.messages == [
        "*demo &lt;1&gt; &amp; co* succeeded\n"
        "• chrf of the student: 32.3 (before 18.04, teacher 47)\n"
        "• speedup: 0.31 (before 0.28)\n"
        "<https://mlflow.example/#/runs/1?a=1&amp;b=2|MLflow>"
    ]


def test_what_else_a_message_says():
    failed = Message("demo", "FAILED", error="step distill:\n" + "x" * 1000).text()
    assert failed.startswith("*demo* failed\nstep distill: xxx")
    assert len(failed) < 600
    assert Message("demo", "CANCELED").text() == "*demo* was cancelled"
    assert Message("demo", "STOPPED").text() == "*demo* was stopped"
    assert Message("demo", "").text() == "*demo* ended; Kubeflow does not say how"
    means = {f"skd/figure_{number}": 0.5 for number in range(20)}
    assert Message("demo", "SUCCEEDED", figures=means).text().count("•") == 12


def test_trouble_that_passes_is_waited_for(channel: Channel):
    channel.answers = [500, 429]
    assert notify.notify(MESSAGE)
    assert len(channel.messages) == 3


@pytest.mark.parametrize(
    ("answers", "requests", "told"), [([503] * 9, 3, "503"), ([404], 1, "404"), ([302], 1, "302"), ([307], 1, "307")]
)
def test_a_service_that_refuses_is_a_warning(
    channel: Channel, caplog: pytest.LogCaptureFixture, answers: list[int], requests: int, told: str
):
    channel.answers = answers
    assert not notify.notify(MESSAGE)
    assert channel.paths == [f"/services/{SECRET}"] * requests  # no redirect is followed
    assert f"the run's end was not sent to the channel: the service answered {told}" in caplog.text


def test_a_service_that_does_not_answer_is_not_asked_twice(
    channel: Channel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(notify, "TIMEOUT_SECONDS", (0.3, 0.3))
    channel.silent.set()
    assert not notify.notify(MESSAGE)
    assert len(channel.messages) == 1
    assert "was not sent to the channel" in caplog.text


def test_nobody_there(channel: Channel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv(WEBHOOK_VARIABLE, f"http://127.0.0.1:{free.getsockname()[1]}/{SECRET}")
        assert not notify.notify(MESSAGE)
    assert "ConnectionError" in caplog.text


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        (f"hooks.example/{SECRET}", "is not a URL"),
        (f"https://[::1/{SECRET}", "is not a URL"),
        (f"https://hooks.example:port/{SECRET}", "is not a URL"),
        (f"file:///{SECRET}", "is not a URL"),
        (f"http://hooks.example/{SECRET}", "is not https://"),
    ],
)
def test_bad_url(
    channel: Channel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, url: str, reason: str
):
    monkeypatch.setenv(WEBHOOK_VARIABLE, url)
    assert not notify.notify(MESSAGE)
    assert reason in caplog.text


def test_nobody_wants_to_know(channel: Channel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    monkeypatch.setenv(WEBHOOK_VARIABLE, "")
    assert not notify.notify(MESSAGE)
    assert not channel.messages
    assert not caplog.text
