"""No traceback reaches a user, whatever is raised."""

from __future__ import annotations

import errno
import io
import logging
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from rich.table import Table

from skd_kfp.pipelines import cli
from skd_lib._core.bugs import Bug, explained, install_command
from skd_lib._core.terminal import Console, VisibleFormatter
from skd_lib.errors import Preempted, SkdError, SkdErrors, Transient
from skd_lib.preflight.checks import Checks

EVIL = "\x1b]0;pwned\x07\x1b[2J\u202e"
SHOWN = "␛]0;pwned␇␛[2J⟨U+202E⟩"


def skd(error: BaseException, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> tuple[int, str]:
    """Exit code and error output of a command that raises."""

    def app() -> None:
        raise error

    monkeypatch.setattr(cli, "app", app)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    output = capsys.readouterr()
    assert output.out == ""
    assert "Traceback" not in output.err
    return int(str(ended.value.code)), output.err


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (SkdError("broken", where="a.yaml", hint="repair it"), 2, "error: a.yaml: broken\n  hint: repair it\n"),
        (Preempted("stopped"), 75, "error: stopped\n"),
        (Transient("away", where="gs://a", hint="try again"), 75, "error: gs://a: away\n  hint: try again\n"),
        (SkdErrors([Transient("away"), Transient("cut off")]), 75, "2 problems found:\n- away\n- cut off"),
        (SkdErrors([Transient("away"), SkdError("wrong")]), 2, "2 problems found:\n- away\n- wrong"),
        (SkdError(f"unknown {EVIL}\nline 2"), 2, f"error: unknown {SHOWN}\nline 2\n"),
        (IsADirectoryError(errno.EISDIR, "Is a directory", "/out"), 2, "/out: Is a directory\n  hint: name a file"),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), 2, "/x: Permission denied\n  hint: change its"),
        (OSError(errno.EADDRINUSE, "Address already in use"), 2, "Address already in use\n  hint: choose another port"),
        (OSError(errno.ENOSPC, "No space left on device", "/x"), 2, "/x: cannot be written: No space left on device"),
        (MemoryError("1 PiB"), 2, "out of memory: 1 PiB"),
        (ModuleNotFoundError("No module named 'kfp'", name="kfp"), 2, "the Python package `kfp` is missing"),
    ],
)
def test_what_a_user_can_act_on_is_a_sentence(
    error: Exception, code: int, message: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
):
    found = skd(error, monkeypatch, capsys)
    assert found[0] == code
    assert message in found[1]


@pytest.mark.parametrize(
    ("module", "extra"),
    [
        ("kfp", "[pipelines]"),
        ("kfp.kubernetes", "[pipelines]"),
        ("google", "[training]"),
        ("google.cloud", "[training]"),
        ("google.cloud.storage", "[training]"),
        ("rouge_score", "[training]"),
        ("torch.nn", "[training]"),
        ("mlflow", "[tracking]"),
        ("s3fs", "[s3]"),
        ("bitsandbytes", "[quantization]"),
        ("typer", ""),
        ("unheard_of", "[training,tracking,pipelines]"),
    ],
)
def test_a_missing_package_comes_with_the_command_that_installs_it(module: str, extra: str):
    command = f'pip install -c constraints/main.txt -e ".{extra}"'
    assert install_command(module) == command
    assert explained(ModuleNotFoundError("x", name=module)).hint == command


@pytest.mark.parametrize(
    ("use", "package", "extra"),
    [
        ("from skd_lib import SKDTrainer", "torch", "training"),
        ("import skd_kfp.pipelines.compiling", "kfp", "pipelines"),  # and not google, which kfp brings
    ],
)
def test_without_an_extra_its_own_package_is_named(use: str, package: str, extra: str):
    code = f"""
import sys
sys.modules.update(dict.fromkeys(("torch", "numpy", "google", "kfp")))  # as if they were not installed
from skd_lib._core.bugs import install_command
try:
    {use}
except ModuleNotFoundError as error:
    assert "[{extra}]" in install_command(error.name), error.name
    print(error.name, str(error))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"{package} ")
    assert ("pip install" in done.stdout) == (extra == "training")  # the command line adds its hint itself


def test_a_bug_is_one_line_that_names_the_file_with_the_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for name in ("SKD_EVENTS", "KUBERNETES_SERVICE_HOST"):
        monkeypatch.delenv(name, raising=False)
    code, told = skd(KeyError(f"a\nb{'x' * 9999}"), monkeypatch, capsys)
    (file,) = tmp_path.iterdir()
    assert code == 70
    assert told.startswith("error: this is a bug in skd: KeyError: ")
    assert told.endswith(f"; please report it and attach {file}\n")
    assert len(told) < 800
    assert told.count("\n") == 1
    assert "Traceback (most recent call last)" in file.read_text()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    assert "the details could not be written" in skd(KeyError("x"), monkeypatch, capsys)[1]


def test_characters_that_the_output_cannot_encode_are_escaped(monkeypatch: pytest.MonkeyPatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(written, encoding="latin-1"))

    def app() -> None:
        raise SkdError("“é” \ud800")

    monkeypatch.setattr(cli, "app", app)
    with pytest.raises(SystemExit):
        cli.main()
    sys.stderr.flush()
    assert written.getvalue() == b"error: \\u201c\xe9\\u201d \\ufffd\n"


def test_a_check_that_fails_unforeseen_keeps_what_the_others_found():
    checks = Checks()
    checks.add("first", "ok", "fine")

    def crash() -> None:
        raise ZeroDivisionError("x")

    assert checks.attempt("second", crash) is None
    checks.add("third", "warning", EVIL, where=EVIL)
    assert [check.level for check in checks.found] == ["ok", "error", "warning"]
    assert checks.found[1].what.startswith("this is a bug in skd: ZeroDivisionError: x; please report it and attach ")


def test_tables_and_logs_show_control_characters():
    screen = io.StringIO()
    table = Table(f"head {EVIL}", "next")
    table.add_row(f"cell {EVIL}", "beside")
    console = Console(file=screen, width=120, force_terminal=True)
    console.print(table)
    console.print(EVIL, markup=False)
    drawn = screen.getvalue()
    assert "\x1b]" not in drawn
    assert "\x1b[2J" not in drawn
    assert "\u202e" not in drawn
    assert "beside" in drawn
    assert drawn.count("pwned") == 3
    record = logging.LogRecord("a", logging.INFO, "", 0, "%s\nline 2", (EVIL,), None)
    assert VisibleFormatter("%(message)s").format(record) == f"{SHOWN}\nline 2"


def test_what_is_explained_stays_what_it_is():
    error = SkdError("x")
    assert explained(error) is error
    assert isinstance(explained(RecursionError("deep")), Bug)


def test_a_reader_that_has_gone_ends_the_command_quietly(monkeypatch: pytest.MonkeyPatch):
    reader, writer = os.pipe()
    os.close(reader)
    stream = os.fdopen(writer, "w")
    monkeypatch.setattr(sys, "stdout", io.StringIO())  # as within KFP
    with pytest.raises(SystemExit) as ended:
        Console(file=stream).print("text")
    assert ended.value.code == 1
    stream.close()  # flushes without an error
