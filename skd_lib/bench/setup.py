"""The parts that all benchmarks share: models, prompts and timing."""

from __future__ import annotations

import gc
import os
import platform
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

from skd_lib.errors import SkdError
from skd_lib.models.loading import avoid_cudnn_attention, default_device, load_model
from skd_lib.models.references import resolve_model
from skd_lib.models.shapes import SHAPES

RANDOM = "random:"


@dataclass(frozen=True)
class Settings:
    """Settings of a benchmark; `skd bench engine --help` describes them.

    Models are references, or `random:` and a shape of `SHAPES`. Prompts have between half of `prompt_tokens` and all.
    Temperatures are 1, and so is top-p. `device` None is the GPU if there is one.
    """

    teacher: str = RANDOM + "smollm2-135m"
    student: str = RANDOM + "smollm2-135m-22-layers"
    batch_size: int = 8
    prompt_tokens: int = 64
    new_tokens: int = 48
    gamma: int = 5
    repeats: int = 5
    top_k: int | None = None
    acceptance: float = 0.9
    dtype: str = "bfloat16"
    device: str | None = None
    seed: int = 0

    def k(self, vocabulary: int) -> int:
        """Return SKD's K for models with this vocabulary size."""
        return round(self.acceptance * vocabulary) if self.top_k is None else self.top_k


def load_pair(settings: Settings) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Load the student and the teacher; raises SkdError for an unknown model, shape or dtype."""
    dtype = getattr(torch, settings.dtype, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise SkdError(f"no floating-point dtype `{settings.dtype}`", where="--dtype", hint="e.g. bfloat16 or float32")
    device = torch.device(settings.device) if settings.device else default_device()
    teacher, student = (
        _model(ref, dtype, device, settings.seed + number)
        for number, ref in enumerate((settings.teacher, settings.student))
    )
    return student, teacher


def prompts_for(settings: Settings, vocabulary: int) -> list[list[int]]:
    """Make prompts of random tokens, from the full length down to half of it."""
    generator = torch.Generator().manual_seed(settings.seed)
    longest, count = settings.prompt_tokens, settings.batch_size
    lengths = [max(longest - (longest // 2) * row // max(count - 1, 1), 1) for row in range(count)]
    return [torch.randint(0, vocabulary, (length,), generator=generator).tolist() for length in lengths]


def timed(run: Callable[[], object], device: torch.device) -> float:
    """Return the seconds that a call takes, without the garbage collector's."""
    gc.collect()
    gc.disable()
    try:
        started = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - started
    finally:
        gc.enable()


def machine_figures(device: torch.device) -> dict[str, Any]:
    """Return the facts of the machine that comparisons need, and its load before the benchmark."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device} {platform.machine()}",
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "load_before": os.getloadavg(),
    }


def k_for(top_k: int | None, teacher: str) -> int | None:
    """Return SKD's K: the paper's for real models; None, for random weights, sets it by acceptance."""
    return 25 if top_k is None and not teacher.startswith(RANDOM) else top_k


def _model(ref: str, dtype: torch.dtype, device: torch.device, seed: int) -> PreTrainedModel:
    if not ref.startswith(RANDOM):
        return load_model(resolve_model(ref), dtype=dtype, device=device)
    avoid_cudnn_attention()
    with torch.random.fork_rng(devices=[]), torch.device(device):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(_shape(ref), dtype=dtype, attn_implementation="sdpa")
    return cast(PreTrainedModel, model.eval())


def _shape(ref: str) -> transformers.PreTrainedConfig:
    shape = ref.removeprefix(RANDOM)
    cut = re.fullmatch(r"(?P<name>.+)-(?P<layers>[1-9]\d*)-layers", shape)
    name = cut["name"] if cut else shape
    if name not in SHAPES:
        hint = f"known shapes: {', '.join(SHAPES)}, each also with -N-layers"
        raise SkdError(f"no shape `{name}`", where=ref, hint=hint)
    config = SHAPES[name]()
    if cut:
        config.num_hidden_layers = int(cut["layers"])
    return config
