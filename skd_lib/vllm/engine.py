"""The vLLM engine of one training, by its configuration."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from transformers import PreTrainedModel

from skd_lib.config import DistillConfig, Schedule
from skd_lib.distillation.methods import METHODS
from skd_lib.models.heads import common_vocabulary
from skd_lib.vllm.client import Engine
from skd_lib.vllm.guard import SHARED_MEMORY
from skd_lib.vllm.head import load_head
from skd_lib.vllm.sampler import VllmEngine
from skd_lib.vllm.serve import Served, serving


@contextmanager
def vllm_engine(
    distill: DistillConfig,
    *,
    student: PreTrainedModel,
    folders: dict[str, Path],
    eos_ids: tuple[int, ...],
    pad_id: int,
    max_new_tokens: int,
    longest: int,
    dtype: torch.dtype,
) -> Iterator[VllmEngine]:
    """Give a training its servers, started here unless the configuration names some.

    Args:
        distill: Its `vllm`, `sampling`, `method` and `temperature`.
        student: The model in training.
        folders: `student` and `teacher` as they are before training.
        eos_ids: Ids that end a response.
        pad_id: Fills rows up.
        max_new_tokens: Longest sampled response.
        longest: Longest prompt with its response, in tokens.
        dtype: Of both models in the servers, and of the teacher's head.

    Raises:
        SkdError: a server does not start, or does not answer.
    """
    settings, sampling = distill.vllm, distill.sampling
    assert not isinstance(sampling.gamma, Schedule)  # noqa: S101 - the configuration refuses it
    gamma = int(sampling.gamma)
    with ExitStack() as stack:
        shared = str(SHARED_MEMORY) if SHARED_MEMORY.is_dir() else None
        exchange = settings.exchange or stack.enter_context(tempfile.TemporaryDirectory(prefix="skd-", dir=shared))
        engines = [Engine(url, shared=bool(settings.exchange)) for url in settings.urls]
        if not engines:
            served = Served(
                folders["teacher"],
                folders["student"],
                gamma,
                max_model_len=longest,
                max_rows=settings.max_rows,
                dtype="bfloat16" if dtype == torch.bfloat16 else "float32",
                tensor_parallel=settings.tensor_parallel,
                memory=settings.memory,
            )
            logs = stack.enter_context(tempfile.TemporaryDirectory(prefix="skd-vllm-"))
            engines = [stack.enter_context(serving(served, Path(logs)))]
        uses_divergence = METHODS[distill.method].uses_divergence
        head = load_head(folders["teacher"], dtype=dtype, device=student.device)
        yield VllmEngine(
            engines=engines,
            student=student,
            head=head,
            vocabulary=common_vocabulary(student, head),
            eos_ids=eos_ids,
            pad_id=pad_id,
            max_new_tokens=max_new_tokens,
            gamma=gamma,
            signal=settings.signal if uses_divergence else "none",
            top_k=settings.top_k,
            temperature=distill.temperature,
            student_params=sampling.student,
            teacher_params=sampling.teacher,
            exchange=Path(exchange),
            dtype=dtype,
        )
