"""Fixtures of the training tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel

from tests.training.nursery import Nursery


@pytest.fixture(scope="session")
def nursery(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    """Processes to kill, and processes that train together."""
    nursery = Nursery(tmp_path_factory.mktemp("nursery") / "log.txt")
    yield nursery
    nursery.close()


@pytest.fixture
def models(tiny_model: Callable[..., PreTrainedModel], tmp_path: Path) -> dict[str, Any]:
    """Folders of a student and a teacher, as options of `tiny_task.main`."""
    student, teacher = tmp_path / "student", tmp_path / "teacher"
    tiny_model(seed=1, vocab_size=64).save_pretrained(student)
    tiny_model(seed=2, vocab_size=64).save_pretrained(teacher)
    return {"student": str(student), "teacher": str(teacher)}
