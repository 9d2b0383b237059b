"""URIs are shown without what is secret in them, and nothing that leaves a process has it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skd_lib._core.uris import holds_secret, how_to_look, redacted, redacted_output, shown
from skd_lib.errors import Preempted


@pytest.mark.parametrize(
    ("uri", "seen"),
    [
        ("http://bob:hunter2@host:5000/x", "http://host:5000/x"),
        ("http://bob:hun/ter@2@host/x", "http://host/x"),
        ("http://bob:hun#ter?2@host", "http://host"),
        ("https://tokenfromhub@host/x", "https://host/x"),
        (
            "postgresql+psycopg2://u:p@h:5432/d?sslmode=require&password=x",
            "postgresql+psycopg2://h:5432/d?sslmode=require&password=***",
        ),
        ("https://host/x?access_token=abc&page=2#api_key=d", "https://host/x?access_token=***&page=2#api_key=***"),
        ("gs://bucket/a@b", "gs://bucket/a@b"),
        ("http://[::1]:5000/models@champion", "http://[::1]:5000/models@champion"),
        ("sqlite:////runs/a@b:c/mlflow.db", "sqlite:////runs/a@b:c/mlflow.db"),
        ("bob:hunter2@host:5000", "***@host:5000"),
        ("http:/bob:hunter2@host", "***@host"),
        ("/a/path", "/a/path"),
        ("", ""),
    ],
)
def test_shown(uri: str, seen: str) -> None:
    assert shown(uri) == seen == shown(seen)
    assert holds_secret(uri) == (uri != seen)


@given(st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z"]), min_size=1).map("pass".__add__))
def test_no_password_is_shown(password: str) -> None:
    assert "pass" not in shown(f"https://user:{password}@host/path")


def test_the_name_of_a_view_is_no_secret() -> None:
    address = "https://mlflow.example/#/experiments/3/runs?viewStateShareKey=skd"
    assert redacted(f"see {address}&access_key=abcd") == f"see {address}&access_key=***"


def test_how_to_look_can_be_pasted_into_a_shell() -> None:
    uri = "sqlite:////a b/it's/mlflow.db"
    assert how_to_look(uri) == """mlflow ui --backend-store-uri 'sqlite:////a b/it'"'"'s/mlflow.db'"""
    assert how_to_look("http://u:p@h") == "http://h"


def test_what_is_known_is_removed_wherever_it_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["skd", "--tracking-uri=https://bob:hunt%40er2@mlflow/x?token=tiger42"])
    monkeypatch.setenv("HTTPS_PROXY", "http://proxyuser:pr0xypass@proxy:3128")
    monkeypatch.setenv("SKD_KFP_TOKEN", "kfpt0ken")
    monkeypatch.setenv("SKD_NOTIFY_WEBHOOK", "https://hooks.example/services/T0/B0/s3cret")
    text = """hunt%40er2 hunt@er2 tiger42 pr0xypass kfpt0ken
        Max retries exceeded with url: /services/T0/B0/s3cret
        Failed to parse: https://other:pw@host, https://host/?api_key=zzz&n=1"""
    clean = redacted(text)
    for secret in ("hunt", "tiger42", "pr0xypass", "kfpt0ken", "s3cret", "pw", "zzz"):
        assert secret not in clean, clean
    assert "https://***@host, https://host/?api_key=***&n=1" in clean
    assert redacted("max_new_tokens=12, a@b.example, x://y") == "max_new_tokens=12, a@b.example, x://y"


@pytest.mark.parametrize("password", ["it's", "pa/ss?w#rd", 'quo"ted', "sm<all>er"])
def test_a_password_with_what_ends_a_url_in_a_sentence_is_known(password: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["skd", "--tracking-uri", f"http://bob:{password}@mlflow/"])
    assert redacted(f"cannot log in as bob with {password}!") == "cannot log in as bob with ***!"


STEP = """
import logging
from skd_lib._core import events
from skd_lib.errors import Preempted
from skd_lib.steps.runtime import run_step

def main() -> None:
    input()
    logging.getLogger("x").warning("saving")
    for _ in range(3):
        events.emit("progress", done=1)
        print("said")
    raise Preempted("stopped")

run_step(main)
"""


def test_a_step_outlives_those_who_read_its_output() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", STEP],
        env={**os.environ, "SKD_EVENTS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    for stream in (process.stdout, process.stderr):
        assert stream is not None
        stream.close()
    assert process.stdin is not None
    process.stdin.write(b"go on\n")
    process.stdin.close()
    assert process.wait(60) == Preempted.exit_code


def test_output_inside_is_redacted(capsys: pytest.CaptureFixture[str]) -> None:
    before = sys.stdout
    with redacted_output():
        print("to https://bob:hunter2@host")
        print("to https://bob:hunter2@host", file=sys.stderr)
    assert sys.stdout is before
    assert capsys.readouterr() == ("to https://***@host\n",) * 2
