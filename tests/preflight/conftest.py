from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from skd_lib.preflight import templates
from tests.conftest import SaveTinyModel
from tests.preflight.support import ROWS


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, save_tiny_model: SaveTinyModel) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("models")
    return save_tiny_model(root / "teacher", layers=4), save_tiny_model(root / "student", layers=2)


@pytest.fixture
def values(tmp_path: Path, models: tuple[Path, Path]) -> dict[str, Any]:
    """A good configuration."""
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    return {
        "name": "tiny",
        "teacher": str(models[0]),
        "student": str(models[1]),
        "data": {"source": {"type": "files", "train": [str(data)]}},
        "task": {"prompt": "translate: {source}", "max_prompt_tokens": 96, "max_new_tokens": 64},
    }


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory, save_tiny_model: SaveTinyModel) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("models")
    return save_tiny_model(root / "teacher", layers=3), save_tiny_model(root / "student", seed=1)


@pytest.fixture
def copies(tmp_path: Path, good: tuple[Path, Path]) -> tuple[Path, Path]:
    """Copies, to be spoilt."""
    teacher, student = (Path(shutil.copytree(path, tmp_path / path.name)) for path in good)
    return teacher, student


@pytest.fixture
def today(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    def be(date: str) -> None:
        monkeypatch.setattr(templates, "today", lambda: date)

    monkeypatch.setattr("skd_lib.data.chat.try_rendering", lambda *_: None)  # no child processes: they cost seconds
    be("2024-01-31")
    return be
