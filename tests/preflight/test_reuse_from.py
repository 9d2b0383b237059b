"""A run past Kubeflow's cache is what later runs with the same data start from."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from skd_lib import storage
from skd_lib.preflight import reuse
from skd_lib.preflight.reuse import FOLDER, keep, reuse_from

look = partial(reuse_from, kind="run")


def make(root: str, preparation: str, new: str) -> str:
    """What preflight and then prepare_data do in a run without reuse."""
    fresh, found = look(root, preparation, new)
    assert found == []
    keep(root, fresh)
    return fresh


@pytest.mark.parametrize("place", ["local", "memory"])
def test_later_runs_with_the_same_data_take_the_last_one(tmp_path: Path, place: str) -> None:
    root = str(tmp_path / "roots") if place == "local" else f"memory://{tmp_path.name}/roots/"
    assert look(root, "data a", "") == ("", [])
    assert not storage.exists(f"{root}/{FOLDER}")  # runs of this machine never write it
    for new in ("run-2", "run-3"):
        fresh = make(root, "data a", new)
        assert fresh.endswith(f":{new}")
        assert look(root, "data a", "") == (fresh, [])
    assert look(root, "data b", "") == ("", [])  # nothing of theirs was made again


def test_a_run_that_has_made_no_data_changes_nothing_for_later_ones(tmp_path: Path) -> None:
    before = make(str(tmp_path), "data", "run-2")
    fresh, _ = look(str(tmp_path), "data", "run-3")
    assert fresh != before
    assert look(str(tmp_path), "data", "") == (before, [])


def test_each_pipeline_and_namespace_has_a_cache_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, file = str(tmp_path), tmp_path / "namespace"
    monkeypatch.setattr(reuse, "NAMESPACE", file)
    file.write_text("team-a\n")
    fresh = make(root, "data", "run-2")
    assert reuse_from(root, "data", "", kind="comparison") == ("", [])
    file.write_text("team-b\n")
    assert look(root, "data", "") == ("", [])
    file.write_text("team-a\n")
    assert look(root, "data", "") == (fresh, [])


def test_without_a_checkpoint_root_nothing_is_kept() -> None:
    assert look("", "data", "") == ("", [])
    fresh, (found,) = look("", "data", "run-2")
    assert (fresh.endswith(":run-2"), found.level) == (True, "warning")
    assert "checkpoint-root" in found.hint
    keep("", fresh)


@pytest.mark.parametrize("fresh", ["", "run-2", "../../x:run-2", f"{'a' * 32}:"])
def test_nothing_is_kept_of_a_text_of_another_kind(tmp_path: Path, fresh: str) -> None:
    keep(str(tmp_path / "root"), fresh)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", [b"\xff", b"{", b"[]", b"{}", b'{"fresh": 1}'])
def test_a_file_that_cannot_be_read_counts_as_none(tmp_path: Path, content: bytes) -> None:
    make(str(tmp_path), "data", "run-2")
    (file,) = (tmp_path / FOLDER).iterdir()
    file.write_bytes(content)
    kept, (found,) = look(str(tmp_path), "data", "")
    assert (kept, found.level, found.where) == ("", "warning", str(file))
    assert "cannot be read" in found.what
    fresh = make(str(tmp_path), "data", "run-3")
    assert look(str(tmp_path), "data", "") == (fresh, [])


def test_what_cannot_be_kept_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / FOLDER).touch()  # no folder
    make(str(tmp_path), "data", "run-2")
    assert "cannot be noted" in caplog.text
    assert "`reuse` false, too" in caplog.text
