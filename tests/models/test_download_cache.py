from __future__ import annotations

import multiprocessing
import time
from pathlib import Path

import pytest

from skd_lib.errors import SkdError
from skd_lib.storage.cache import cached_folder, default_cache_dir


def test_cache_dir_is_configured_by_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SKD_CACHE", str(tmp_path))
    assert default_cache_dir() == tmp_path
    monkeypatch.delenv("SKD_CACHE")
    assert default_cache_dir() == Path.home() / ".cache" / "skd"


def test_builds_once_and_reuses(tmp_path: Path) -> None:
    built = []

    def build(folder: Path) -> None:
        built.append(folder)
        (folder / "file").write_text("content")

    for _ in range(2):
        assert (cached_folder(tmp_path / "entry", build) / "file").read_text() == "content"
    assert len(built) == 1


def test_a_failed_build_leaves_no_entry(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "file").write_text("half")
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        cached_folder(tmp_path / "entry", fail)
    assert [path.name for path in tmp_path.iterdir()] == ["entry.lock"]


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / ".entry.abandoned" / "new").mkdir(parents=True)
    cached_folder(tmp_path / "entry", lambda folder: (folder / "file").touch())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["entry", "entry.lock"]


def _slow_build(folder: Path) -> None:
    (folder / "file").write_text("content")
    with (folder.parents[1] / "builds").open("a") as log:
        log.write("build\n")
    time.sleep(0.5)


def test_two_processes_build_one_entry_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=cached_folder, args=(tmp_path / "entry", _slow_build)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert (tmp_path / "builds").read_text() == "build\n"


def test_unwritable_cache_names_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SkdError, match="cannot write the cache") as caught:
        cached_folder(tmp_path / "file" / "entry", lambda folder: None)
    assert "SKD_CACHE" in caught.value.hint
