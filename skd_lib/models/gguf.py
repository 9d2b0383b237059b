"""Conversion of GGUF files, the single-file format of llama.cpp, to the Hugging Face layout.

Transformers dequantizes the weights and rebuilds the tokenizer. This module adds pre-tokenizers that it does not know,
and saves a model that it regards as quantized and would refuse to save.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from gguf import GGUFReader
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from skd_lib.errors import SkdError
from skd_lib.models.files import context_length, reading, reason
from skd_lib.models.loading import write_model
from skd_lib.models.skeleton import check_loaded

log = logging.getLogger(__name__)

_HINT = "use the model's safetensors repository instead of its GGUF file"
_ROTARY = "rope_freqs.weight"
_PRE_TOKENIZER = "tokenizer.ggml.pre"


def convert_gguf(file: Path, folder: Path) -> None:
    """Write the model and tokenizer of a GGUF file into an existing folder, in float32 safetensors.

    Memory: two copies of the float32 weights at the peak, about 8 bytes a parameter.
    """
    log.info("converting %s to safetensors", file.name)
    reader = _open(file)
    _check_whole(reader, file)
    try:
        loaded, info = AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, dtype=torch.float32, output_loading_info=True
        )
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever a broken file makes the readers do
        raise SkdError(
            f"transformers cannot read this GGUF file: {reason(error)}", where=str(file), hint=_HINT
        ) from error
    check_loaded(info, file)
    _check_used(reader, loaded, file)
    field = reader.get_field(_PRE_TOKENIZER)
    if field is not None and str(field.contents()) == "smollm":
        _restore_smollm(tokenizer)
    model = _without_quantizer(loaded)
    tokenizer.model_max_length = context_length(model.config)
    write_model(model, tokenizer, folder)


def _restore_smollm(tokenizer: PreTrainedTokenizerBase) -> None:
    """Set the pre-tokenizer `smollm`, which transformers does not: other cuts make ids that the model has never seen.

    It splits digits one by one before anything else (SmolLM2's own `tokenizer.json`): of two spaces and a digit, the
    spaces are one token. Transformers 5.23 leaves the digits to GPT-2's expression, which binds the last space to them.
    """
    backend = cast(Any, tokenizer).backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )


def _open(file: Path) -> GGUFReader:
    try:
        with reading(file):
            return GGUFReader(file)
    except SkdError:
        raise
    except Exception as error:  # the reader takes what it finds for lengths and offsets
        raise SkdError(
            f"not a GGUF file: {reason(error)}", where=str(file), hint="it may be cut off; fetch it again"
        ) from error


def _check_whole(reader: GGUFReader, file: Path) -> None:
    """Check that a file is all of its model, and holds nothing that transformers is known to leave out."""
    pieces = int(_number(reader, "split.count") or 1)
    if pieces > 1:
        piece, tensors = int(_number(reader, "split.no") or 0) + 1, _number(reader, "split.tensors.count")
        of = "" if tensors is None else f" of {int(tensors)}"
        raise SkdError(
            f"it is piece {piece} of {pieces} of a split GGUF file, with {len(reader.tensors)}{of} tensors",
            where=str(file),
            hint="join the pieces, `llama-gguf-split --merge FIRST_PIECE WHOLE.gguf`, and name the whole file",
        )
    for tensor in reader.tensors:
        if tensor.name == _ROTARY and not np.all(tensor.data == 1):
            raise SkdError(
                f"its rotary positions are scaled ({_ROTARY}, as in Llama 3.1), which transformers leaves out",
                where=str(file),
                hint=_HINT,
            )


def _check_used(reader: GGUFReader, model: PreTrainedModel, file: Path) -> None:
    """Check that transformers has dropped no tensor, as it does silently where it knows no name for one.

    Compares numbers of elements, since names and shapes change: the model has all of the file's, except a head that is
    a copy of the embedding.
    """
    sizes = {tensor.name: int(tensor.n_elements) for tensor in reader.tensors if tensor.name != _ROTARY}
    if model.get_input_embeddings().weight is model.get_output_embeddings().weight:
        sizes.pop("output.weight", None)
    weights = sum(weight.numel() for weight in set(model.state_dict(keep_vars=True).values()))
    if sum(sizes.values()) > weights:
        raise SkdError(
            f"it holds {sum(sizes.values()):,} weights, of which transformers takes {weights:,} into its "
            f"{type(model).__name__}",
            where=str(file),
            hint=_HINT,
        )


def _number(reader: GGUFReader, name: str) -> float | None:
    field = reader.get_field(name)
    return None if field is None else float(field.contents())


def _without_quantizer(loaded: PreTrainedModel) -> PreTrainedModel:
    """Return the same weights in a model that transformers does not regard as quantized and refuse to save."""
    config = loaded.config
    del config.quantization_config
    weights = loaded.state_dict()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(weights, strict=True, assign=True)
    model.tie_weights()
    model.generation_config = loaded.generation_config
    return cast(PreTrainedModel, model)
