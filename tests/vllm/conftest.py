"""A real vLLM server with a tiny teacher and student, for all tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from skd_lib.config import SamplingParams
from skd_lib.models.files import weights_sample
from skd_lib.sampling.acceptance import AcceptanceRule
from skd_lib.sampling.engine import Sampler
from skd_lib.vllm.client import Engine
from skd_lib.vllm.head import load_head
from skd_lib.vllm.sampler import VllmEngine
from skd_lib.vllm.serve import Served, serving
from skd_lib.vllm.settings import RolloutSettings
from tests.conftest import SaveTinyModel

EOS, GAMMA, NEW = 2, 4, 24


@dataclass
class Pair:
    """Folders and loaded models."""

    folders: dict[str, Path]
    student: PreTrainedModel
    teacher: PreTrainedModel

    def prompts(self, rows: int, shortest: int = 2, longest: int = 30) -> list[list[int]]:
        generator = torch.Generator().manual_seed(3)
        lengths = torch.randint(shortest, longest, (rows,), generator=generator).tolist()
        return [torch.randint(3, 320, (length,), generator=generator).tolist() for length in lengths]

    def own(
        self, rule: AcceptanceRule, params: tuple[SamplingParams, SamplingParams], vocabulary: int = 320
    ) -> Sampler:
        return Sampler(
            self.student if rule.drafts else None,
            self.teacher if rule.asks_teacher else None,
            rule,
            eos_ids=(EOS,),
            pad_id=0,
            max_new_tokens=NEW,
            gamma=GAMMA,
            student_params=params[0],
            teacher_params=params[1],
            keep_teacher_states=rule.asks_teacher,
            vocabulary=vocabulary,
        )

    def engine(
        self,
        server: Engine,
        exchange: Path,
        params: tuple[SamplingParams, SamplingParams],
        signal: Any = "states",
        vocabulary: int = 320,
        new: int = NEW,
    ) -> VllmEngine:
        return VllmEngine(
            engines=[server],
            student=self.student,
            head=load_head(self.folders["teacher"], dtype=torch.float32),
            teacher=weights_sample(self.folders["teacher"]),
            settings=RolloutSettings(
                student=params[0], teacher=params[1], vocabulary=vocabulary, signal=signal, top_k=8
            ),
            eos_ids=(EOS,),
            pad_id=0,
            max_new_tokens=new,
            gamma=GAMMA,
            exchange=exchange,
        )


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory, save_tiny_model: SaveTinyModel) -> Pair:
    from skd_lib.models.loading import load_model

    root = tmp_path_factory.mktemp("eagle-pair")  # a name that vLLM would misread
    # vLLM's attention on CPUs wants heads of 32 or more.
    folders = {
        # A position less than the servers' limit, with drafts.
        "student": save_tiny_model(root / "student", seed=1, hidden=128, max_position_embeddings=105),
        "teacher": save_tiny_model(root / "teacher", seed=2, hidden=256),
    }
    return Pair(folders, load_model(folders["student"]), load_model(folders["teacher"]))


def served(pair: Pair, rows: int, *more: str, longest: int = 96) -> Served:
    """What a server of the pair is started with, in fp32."""
    models = pair.folders["teacher"], pair.folders["student"]
    return Served(*models, GAMMA, max_model_len=longest, max_rows=rows, dtype="float32", more=more)


@pytest.fixture(scope="session")
def server(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """A server with room for all rows."""
    with serving(served(pair, 64), tmp_path_factory.mktemp("server")) as engine:
        yield engine
