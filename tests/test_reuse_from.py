"""A run past Kubeflow's cache is what later runs with the same data start from."""

from __future__ import annotations

from pathlib import Path

import pytest

from skd_lib import storage
from skd_lib.preflight.reuse import FOLDER, reuse_from


@pytest.mark.parametrize("place", ["local", "memory"])
def test_later_runs_with_the_same_data_take_the_last_one(tmp_path: Path, place: str) -> None:
    root = str(tmp_path / "roots") if place == "local" else f"memory://{tmp_path.name}/roots/"
    assert reuse_from(root, "data a", "") == ("", [])
    assert not storage.exists(f"{root}/{FOLDER}")  # runs of this machine never write it
    for new in ("run-2", "run-3"):
        assert reuse_from(root, "data a", new) == (new, [])
    assert reuse_from(root, "data a", "") == ("run-3", [])
    assert reuse_from(root, "data b", "") == ("", [])  # nothing of theirs was made again


def test_without_a_checkpoint_root_nothing_is_kept() -> None:
    assert reuse_from("", "data", "") == ("", [])
    kept, (found,) = reuse_from("", "data", "run-2")
    assert (kept, found.level) == ("run-2", "warning")
    assert "checkpoint-root" in found.hint


@pytest.mark.parametrize("content", [b"\xff", b"{", b"[]", b"{}", b'{"fresh": 1}'])
def test_a_file_that_cannot_be_read_counts_as_none(tmp_path: Path, content: bytes) -> None:
    reuse_from(str(tmp_path), "data", "run-2")
    (file,) = (tmp_path / FOLDER).iterdir()
    file.write_bytes(content)
    kept, (found,) = reuse_from(str(tmp_path), "data", "")
    assert (kept, found.level, found.where) == ("", "warning", str(file))
    assert "cannot be read" in found.what
    assert reuse_from(str(tmp_path), "data", "run-3") == ("run-3", [])
    assert reuse_from(str(tmp_path), "data", "") == ("run-3", [])


def test_what_cannot_be_kept_is_a_warning(tmp_path: Path) -> None:
    (tmp_path / FOLDER).touch()  # no folder
    kept, (found,) = reuse_from(str(tmp_path), "data", "run-2")
    assert (kept, found.level) == ("run-2", "warning")
    assert "cannot be noted" in found.what
