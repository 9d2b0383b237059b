"""A teacher of which only the head is in memory: vLLM's states are enough for the rest."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from skd_lib.errors import SkdError
from skd_lib.models.files import load_config, stored_tensors


def load_head(folder: Path, *, dtype: torch.dtype, device: torch.device | str = "cpu") -> PreTrainedModel:
    """Load a model's head; all other weights stay on the meta device.

    Args:
        folder: In the Hugging Face layout.
        dtype: The head is converted to it.
        device: Of the head.

    Raises:
        SkdError: the folder has no weights for a head, or quantized ones.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(load_config(folder), dtype=dtype)
    heads, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    names = {module: name for name, module in model.named_modules()}
    stored = {tensor.name: tensor.file for tensor in stored_tensors(folder)}
    # A tied head is stored as the embedding.
    weight = next((f"{names[m]}.weight" for m in (heads, embedding) if f"{names[m]}.weight" in stored), None)
    if weight is None:
        raise SkdError("no weights of a head or an embedding in its files", where=str(folder))
    tensors = {"weight": weight, "bias": f"{names[heads]}.bias"}
    loaded = {}
    for name, stored_name in tensors.items():
        if stored_name in stored:
            with safe_open(stored[stored_name], "pt") as file:
                tensor = file.get_tensor(stored_name)
            if tensor.dtype.itemsize < 2:
                raise SkdError(
                    f"its head is quantized: {stored_name} is {str(tensor.dtype).removeprefix('torch.')}",
                    where=str(folder),
                    hint="take a copy whose head is not quantized, or `distill.engine: transformers`",
                )
            loaded[name] = tensor.to(device, dtype)
    rows, hidden = loaded["weight"].shape
    head = nn.Linear(hidden, rows, bias="bias" in loaded, device="meta")
    for name, tensor in loaded.items():
        setattr(head, name, nn.Parameter(tensor, requires_grad=False))
    model.set_output_embeddings(head)
    return model.eval().requires_grad_(requires_grad=False)
