"""vLLM servers for `SKDTrainer`: `SKDConfig(engine="vllm")`."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from skd_lib.config import DistillConfig, Schedule
from skd_lib.errors import SkdError
from skd_lib.models.files import load_config
from skd_lib.models.references import resolve_model
from skd_lib.training.skd_config import SKDConfig
from skd_lib.vllm.engine import vllm_engine
from skd_lib.vllm.sampler import VllmEngine
from skd_lib.vllm.serve import room


def start_engine(
    args: SKDConfig,
    distill: DistillConfig,
    student: PreTrainedModel,
    teacher: Any,
    tokenizer: PreTrainedTokenizerBase,
    **ids: Any,
) -> tuple[VllmEngine, ExitStack]:
    """Start a training's servers, or take those that are named; return them with what ends them when it is closed.

    Args:
        args: Its lengths and its precision.
        distill: Its `vllm`, `sampling`, `method` and `temperature`.
        student: The model in training, without adapters yet.
        teacher: A folder, a hub id or another reference.
        tokenizer: Of both models.
        ids: `eos_ids` and `pad_id`.

    Raises:
        SkdError: the teacher is no reference, or a server does not start.
    """
    if not isinstance(teacher, str):
        hint = "pass its folder or name: the servers load it, and the training loads its head alone"
        raise SkdError(
            "with the engine vllm the teacher is not loaded here", where="SKDTrainer, teacher_model", hint=hint
        )
    folder = resolve_model(teacher)
    gamma = distill.sampling.gamma
    assert not isinstance(gamma, Schedule)  # noqa: S101 - the configuration refuses it
    longest = args.max_new_tokens + (args.max_length or torch.iinfo(torch.int32).max)
    if (limit := room((load_config(folder), student.config), gamma)) is not None:
        longest = min(longest, limit)
    half = args.bf16 or student.dtype == torch.bfloat16
    stack = ExitStack()
    try:
        # Of the student vLLM wants the shape and the names; its weights go over with the first step.
        own = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="skd-student-")))
        if not distill.vllm.urls and args.process_index == 0:
            student.save_pretrained(own)
            tokenizer.save_pretrained(own)
        engine = vllm_engine(
            distill,
            student=student,
            folders={"teacher": folder, "student": own},
            max_new_tokens=args.max_new_tokens,
            longest=longest,
            dtype=torch.bfloat16 if half else torch.float32,
            **ids,
        )
        return stack.enter_context(engine), stack
    except BaseException:
        stack.close()
        raise
