"""GGUF files, the single-file format of llama.cpp, turned into the Hugging Face layout.

Transformers dequantizes the weights and rebuilds the tokenizer. What it leaves undone is done here: pre-tokenizers
it does not know, and a model that it regards as quantized and would refuse to save.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, cast

import torch
from gguf import GGUFReader
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from skd_lib.errors import SkdError
from skd_lib.models.loading import write_model

log = logging.getLogger(__name__)

PRE_TOKENIZER_FIELD = "tokenizer.ggml.pre"


def convert_gguf(file: Path, folder: Path, *, context_length: int | None = None) -> None:
    """Write the model and tokenizer of a GGUF file into `folder`, in float32 safetensors.

    Memory: two copies of the float32 weights at the peak, about 8 bytes a parameter.

    Args:
        file: The `.gguf` file.
        folder: An existing folder to write into.
        context_length: Longest input of the tokenizer; None for what the file says.

    Raises:
        SkdError: not a GGUF file, or one whose architecture or tokenizer transformers cannot read.
    """
    log.info("converting %s to safetensors", file.name)
    pre_tokenizer = _pre_tokenizer_name(file)
    try:
        loaded = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    except (ValueError, KeyError, OSError, NotImplementedError) as error:
        raise SkdError(
            f"transformers cannot read this GGUF file: {error}",
            where=str(file),
            hint="use the model's safetensors repository instead of its GGUF file",
        ) from error
    restore_pre_tokenizer(tokenizer, pre_tokenizer)
    model = _without_quantizer(loaded)
    tokenizer.model_max_length = context_length or model.config.get_text_config().max_position_embeddings
    write_model(model, tokenizer, folder)


def restore_pre_tokenizer(tokenizer: PreTrainedTokenizerBase, name: str | None) -> None:
    """Give the tokenizer the pre-tokenizer that its GGUF file names, where transformers has not.

    A tokenizer that cuts text in other places than the one a model was trained with gives it ids it has never seen.
    `smollm` takes digits out one by one before anything else (SmolLM2's own `tokenizer.json`): of two spaces and a
    digit, the spaces are one token. Transformers 5.23 leaves the digits to GPT-2's expression, which binds the last
    space to them.

    Args:
        tokenizer: Changed in place.
        name: The file's `tokenizer.ggml.pre`; names other than `smollm` are left as transformers has set them.
    """
    if name == "smollm":
        backend = cast(Any, tokenizer).backend_tokenizer
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )


def _pre_tokenizer_name(file: Path) -> str | None:
    try:
        field = GGUFReader(file).get_field(PRE_TOKENIZER_FIELD)
    except (ValueError, IndexError) as error:
        raise SkdError(
            f"not a GGUF file: {error}", where=str(file), hint="it may be cut off; fetch it again"
        ) from error
    return None if field is None else str(field.contents())


def _without_quantizer(loaded: PreTrainedModel) -> PreTrainedModel:
    """The same weights in a model that transformers does not regard as quantized, since it refuses to save such."""
    config = loaded.config
    del config.quantization_config
    weights = loaded.state_dict()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(weights, strict=True, assign=True)
    model.tie_weights()
    model.generation_config = loaded.generation_config
    return cast(PreTrainedModel, model)
