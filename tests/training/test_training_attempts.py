"""Attempts at the same work at the same time."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from skd_lib.errors import SkdError
from skd_lib.training.attempts import ALIVE, Heartbeat, living
from skd_lib.training.checkpoints import Attempt, Checkpoints


def written(attempt: Attempt, step: int, best: int = 0, keep: int = 1) -> Path:
    """A checkpoint that an attempt has made."""
    folder = attempt.begin(step)
    (folder / "weights").write_text(f"{attempt.name} {step}")
    attempt.commit(step, best, keep)
    return folder


def sign(folder: Path, *, age: float = 0, **owner: Any) -> None:
    """A sign of life that another process has given."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ALIVE).write_text(json.dumps({"machine": "another", "pid": 1, "started": "1", **owner}))
    os.utime(folder / ALIVE, (time.time() - age,) * 2)


def left(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("*/checkpoint-*")}


def test_an_attempts_checkpoints_are_its_own(tmp_path: Path) -> None:
    work = Checkpoints(tmp_path)
    with work.attempt() as first, Checkpoints(tmp_path).attempt() as second:
        written(first, 10)
        # A retry begins while the pod before it goes on.
        copy = second.take_over()
        assert copy is not None
        assert (copy / "weights").read_text() == f"{first.name} 10"
        written(first, 20)
        assert left(tmp_path) == {"checkpoint-10", "checkpoint-20"}
        written(second, 20, best=10)
        written(first, 20)  # the same step again, into other files
        assert (second.folder / "checkpoint-20" / "weights").read_text() == f"{second.name} 20"
        # One of them is through.
        work.remove()
        assert {path.parent.name for path in tmp_path.glob("*/checkpoint-*")} == {second.name}
        written(second, 30, best=10)
        assert left(tmp_path) == {"checkpoint-10", "checkpoint-30"}


def test_what_others_left_is_deleted_once_it_is_of_no_use(tmp_path: Path) -> None:
    for name, age, step in (("gone", 9999, 20), ("gone-further", 9999, 40), ("running", 0, 10)):
        elsewhere = Attempt(Checkpoints(tmp_path / "elsewhere"), name)
        written(elsewhere, step)
        elsewhere.folder.rename(tmp_path / name)
        sign(tmp_path / name, age=age)
    elsewhere.work.folder.rmdir()
    work = Checkpoints(tmp_path)
    with work.attempt() as attempt:
        written(attempt, 15)
        assert left(tmp_path) == {"checkpoint-10", "checkpoint-15", "checkpoint-20", "checkpoint-40"}
        written(attempt, 20)
        assert not (tmp_path / "gone").exists()
    work.remove()
    assert left(tmp_path) == {"checkpoint-10"}


def test_a_checkpoint_that_is_deleted_while_it_is_read_is_looked_for_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Checkpoints(tmp_path).attempt() as owner, Checkpoints(tmp_path).attempt() as reader:
        old, link = written(owner, 10), os.link

        def too_late(source: Path, to: Path) -> None:
            if old in source.parents and old.exists():
                written(owner, 20)
            link(source, to)

        monkeypatch.setattr(os, "link", too_late)
        assert reader.take_over() == reader.folder / "checkpoint-20"
        assert not old.exists()
        monkeypatch.setattr(os, "link", lambda *_: link(tmp_path / "nothing", tmp_path / "there"))
        with pytest.raises(SkdError, match=r"deleted as soon as they are found(.|\n)*another training"):
            reader.take_over()


def test_a_process_of_this_machine_tells_whether_it_is_running(tmp_path: Path) -> None:
    folder = str(tmp_path / "running")
    script = (
        f"from skd_lib.training.attempts import Heartbeat\nwith Heartbeat([{folder!r}]): print(flush=True), input()"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        given = json.loads((tmp_path / "running" / ALIVE).read_text())
        assert given["machine"]
        sign(tmp_path / "running", age=9999, **given)
        sign(tmp_path / "its-number-was-given-again", **{**given, "started": "1"})
        sign(tmp_path / "ended", **{**given, "pid": 2**22 + 1, "started": "1"})
        everyone = {path.name for path in tmp_path.iterdir()}
        assert living(str(tmp_path), everyone, own="") == {"running"}
        other.communicate(b"\n")
        assert living(str(tmp_path), everyone, own="") == set()


def test_the_age_of_its_sign_tells_of_another_machine(tmp_path: Path) -> None:
    sign(tmp_path / "running", age=150)
    sign(tmp_path / "silent", age=250)
    (tmp_path / "never").mkdir()
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / ALIVE).write_text("{")
    everyone = {path.name for path in tmp_path.iterdir()}
    assert living(str(tmp_path), everyone, own="") == {"running", "damaged"}
    # The store's clock goes before this machine's.
    sign(tmp_path / "own", age=120)
    assert living(str(tmp_path), everyone, own="own") == {"running", "silent", "damaged"}


def test_signs_of_life_are_given_again_and_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with Heartbeat([str(tmp_path / "a")], interval=0.01):
        for _ in range(2):
            (tmp_path / "a" / ALIVE).unlink()
            end = time.monotonic() + 10
            while not (tmp_path / "a" / ALIVE).exists():
                assert time.monotonic() < end
                time.sleep(0.005)
        shutil.rmtree(tmp_path / "a")
        (tmp_path / "a").write_text("")  # nothing can be written there any more
        while "could not be written" not in caplog.text:
            assert time.monotonic() < end + 10
            time.sleep(0.005)
    with pytest.raises(SkdError, match="x"), Heartbeat([str(tmp_path / "b")]):
        raise SkdError("x")
    assert not (tmp_path / "b" / ALIVE).exists()
