from __future__ import annotations

from pathlib import Path

import pytest

from skd_lib.errors import SkdError
from skd_lib.steps.runtime import present


@pytest.mark.parametrize("kind", ["missing", "empty folder", "folder of empty folders", "empty file"])
def test_an_input_that_is_gone_is_told_with_the_remedy(tmp_path: Path, kind: str):
    path = tmp_path / "teacher"
    if kind == "empty file":
        path.touch()
    elif kind != "missing":
        (path / "inner" if "folders" in kind else path).mkdir(parents=True)
    with pytest.raises(SkdError, match="the input `teacher` is gone from storage") as error:
        present("teacher", path)
    assert str(path) in str(error.value)
    assert "skd submit --no-reuse" in error.value.hint


def test_what_is_there_passes(tmp_path: Path):
    (tmp_path / "model" / "inner").mkdir(parents=True)
    file = tmp_path / "model" / "inner" / "config.json"
    file.write_text("{}")
    assert present("model", tmp_path / "model") == tmp_path / "model"
    assert present("figures", file) == file
