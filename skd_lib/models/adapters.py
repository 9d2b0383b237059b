"""LoRA (Hu et al. 2021, arXiv 2106.09685): train small matrices beside frozen weights, and add them in at the end."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from skd_lib.config import LoraConfig
from skd_lib.errors import SkdError


def add_lora(model: PreTrainedModel, settings: LoraConfig, seed: int) -> Any:
    """Freeze a model and put trainable adapters beside its weights, in place.

    Args:
        model: Its linear layers but for the head get adapters, or those that `settings` names.
        settings: Rank, scale, dropout and place of the adapters.
        seed: Decides the adapters' first values; they change no output until they are trained.

    Returns:
        The wrapped model (`peft.PeftModel`), which is used in place of `model`.

    Raises:
        SkdError: peft is not installed, or no layer has one of the names.
    """
    try:
        import peft
    except ImportError as error:
        hint = "pip install 'skd-lib[training]', or leave the section out"
        raise SkdError("LoRA needs the package peft", where="training.lora", hint=hint) from error
    config = peft.LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=settings.target_modules or "all-linear",
        task_type="CAUSAL_LM",
    )
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return peft.get_peft_model(model, config)
    except ValueError as error:
        raise SkdError(
            f"adapters cannot be added to {type(model).__name__}: {error}",
            where="training.lora.target_modules",
            hint="name linear layers as they end in the model, e.g. q_proj, or leave it empty for all",
        ) from error


def merge_lora(wrapped: Any) -> None:
    """Add the adapters into the weights and take them away: the model inside is again what `add_lora` was given.

    Raises:
        SkdError: a merged weight is not finite.
    """
    try:
        model = wrapped.merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise SkdError(f"the adapters cannot be merged: {error}", where="training.lora") from error
    model.requires_grad_(requires_grad=True)
