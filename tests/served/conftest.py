"""A server with a tiny real model, and the teacher that it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from skd_lib.config import TaskConfig
from skd_lib.config.models import ServedTeacher
from skd_lib.served.teacher import RemoteTeacher
from tests.conftest import TinyModel
from tests.support.completions_server import MODEL, CompletionsServer

EOS = 2
ENDS = (EOS, *range(100, 112))
"""Ids that end a response; many, so that some responses of a random model end."""
MakeTeacher = Callable[..., RemoteTeacher]


@pytest.fixture(scope="session")
def model(tiny_model: TinyModel) -> PreTrainedModel:
    return tiny_model(seed=2)


@pytest.fixture
def server(
    model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> Iterator[CompletionsServer]:
    monkeypatch.delenv("SKD_TEACHER_API_KEY", raising=False)
    with CompletionsServer(model, tiny_tokenizer) as running:
        yield running


@pytest.fixture
def make_teacher(server: CompletionsServer, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> MakeTeacher:
    """Make a teacher that keeps its answers in a folder, as each attempt at the same work does."""

    def make(
        keep: bool = True, retries: int = 0, ends: tuple[int, ...] = ENDS, private: bool = False, **fields: str
    ) -> RemoteTeacher:
        served = ServedTeacher.model_validate({"url": server.url, "model": MODEL, **fields})
        teacher = RemoteTeacher(served, tiny_tokenizer, TaskConfig(chat_template=False), ends, retries, private=private)
        if keep:
            teacher.keep(tmp_path / "asked")
        return teacher

    return make
