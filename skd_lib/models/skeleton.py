"""A model without its weights, and checks that the weights in a folder are the ones it wants, and finite.

Transformers itself matches the files' names and shapes with the model's, on the meta device: with its prefixes,
renamings and fused experts, as when it loads them, but from the files' headers alone.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging as transformers_logging

from skd_lib.errors import SkdError
from skd_lib.models.files import StoredTensor, has_own_head, load_config, reading, reason, stored_tensors, weight_files
from skd_lib.models.heads import check_structure

log = logging.getLogger(__name__)

_MOST_LAYERS = 2000
_EXAMPLES_SHOWN = 5
_MASK = re.compile(r"\.(attn|attention)(\.attention)?\.(masked_)?bias$")
"""Causal masks that old versions of transformers saved with GPT-2, GPT-Neo, GPT-J and CodeGen: no weights."""
_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_INTEGERS = {"I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8", "BOOL"}
_EXPONENTS: dict[str, tuple[Any, int]] = {
    "F64": (np.uint64, 0x7FF0_0000_0000_0000),
    "F32": (np.uint32, 0x7F80_0000),
    "F16": (np.uint16, 0x7C00),
    "BF16": (np.uint16, 0x7F80),
}
"""Words of a dtype's size, and the bits that are all set in infinities and NaN alone."""
WHOLE = 1 << 27
"""Bytes of weights that `check_finite` reads."""
_PLACES = 4


def skeleton(folder: Path) -> PreTrainedModel:
    """Build the causal language model that a folder's config.json describes, on the meta device."""
    config = load_config(folder)
    check_decoder_only(config, folder)
    layers = getattr(config.get_text_config(), "num_hidden_layers", None)
    if isinstance(layers, int) and not 0 < layers <= _MOST_LAYERS:
        raise SkdError(
            f"its config.json names {layers} layers", where=str(folder), hint="correct num_hidden_layers in config.json"
        )
    if getattr(config, "tie_word_embeddings", False) and weight_files(folder) and has_own_head(folder):
        untie(config)
    try:
        with torch.device("meta"), quiet():
            model = AutoModelForCausalLM.from_config(config)
    except Exception as error:  # whatever an architecture's code makes of its config
        raise SkdError(
            f"not a causal language model: {reason(error)}",
            where=str(folder),
            hint="use a decoder-only language model that transformers knows, with its own config.json",
        ) from error
    try:
        check_structure(model)
    except SkdError as error:
        raise SkdError(error.what, where=str(folder), hint=error.hint) from error
    return cast(PreTrainedModel, model)


def check_decoder_only(config: Any, folder: Path) -> None:
    """Check that a config is of no encoder-decoder, that its fields name one architecture, and that none is NaN."""
    if config.is_encoder_decoder:
        raise SkdError(
            f"cannot use this `{config.model_type}` model: it is an encoder-decoder",
            where=str(folder),
            hint="use a decoder-only language model, e.g. Llama, Mistral, Qwen or Gemma",
        )
    if broken := [name for name, value in config.to_dict().items() if isinstance(value, float) and math.isnan(value)]:
        raise SkdError(
            f"its config.json has NaN for {_examples(broken)}", where=str(folder), hint="correct it in config.json"
        )
    made = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    named = getattr(config, "architectures", None) or []
    if not isinstance(named, list):
        raise SkdError(
            f"its config.json has {named!r} for `architectures`", where=str(folder), hint="give it a list of names"
        )
    others = [one for one in named if one in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()]
    if made and others and made not in others:
        raise SkdError(
            f"its config.json names the architecture {others[0]}, and its model_type `{config.model_type}` is loaded "
            f"as {made}",
            where=str(folder),
            hint="fetch the model's own config.json again",
        )


def follow_ties(model: PreTrainedModel) -> None:
    """Untie head and embedding in a model's config where they are two tensors.

    Transformers keeps both tensors of files that hold both, whatever the config says; a model that is built from the
    config again would tie them.
    """
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if getattr(head, "weight", None) is not getattr(embedding, "weight", None):
        untie(model.config)


def untie(config: Any) -> None:
    """Change a config so that head and embedding are two tensors."""
    for part in (config, config.get_text_config(decoder=True)):
        if getattr(part, "tie_word_embeddings", False):
            part.tie_word_embeddings = False


def check_weights(folder: Path, model: PreTrainedModel) -> str:
    """Compare the names and shapes in a folder's weight files with a model's, by their headers only.

    Where they cannot be compared, return the reason; else an empty text.
    """
    tensors = stored_tensors(folder)
    quantized = getattr(model.config, "quantization_config", None)
    plain = all(tensor.dtype in _FLOATS for tensor in tensors)
    if quantized is not None and not plain:
        return "its weights are quantised"
    config = model.config
    if quantized is not None:
        config = type(config).from_dict({**config.to_dict(), "quantization_config": None})
        del config.quantization_config
    try:
        with torch.device("meta"):
            stored = {
                tensor.name: torch.empty(tensor.shape, dtype=_FLOATS.get(tensor.dtype, torch.uint8))
                for tensor in tensors
            }
        with quiet():
            _, info = type(model).from_pretrained(
                None,
                config=config,
                state_dict=stored,
                device_map={"": "meta"},
                dtype=torch.float32,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except Exception as error:  # a look at a good model must not fail it: loading has the last word
        log.debug("the weights of %s are not compared with its config", folder, exc_info=True)
        return f"transformers cannot compare them without loading them: {reason(error)}"
    if quantized is not None:
        if any(info.values()):
            return "its weights are quantised"
        method = quantized.get("quant_method") if isinstance(quantized, dict) else quantized.quant_method
        raise SkdError(
            f"config.json says that the weights are quantised ({method}), and they are not",
            where=str(folder),
            hint="remove quantization_config from config.json, or fetch the quantised weights",
        )
    check_loaded(info, folder)
    check_stored(tensors, model, folder)
    return ""


def check_loaded(info: dict[str, Any], path: Path) -> None:
    """Check that every weight of a model came from its files, and every tensor of the files went into the model.

    Tensors that the architecture itself declares to be ignored are not in `info`, transformers' report of loading.
    """
    found = [
        f"{len(names)} {kind}: {_examples(names)}"
        for kind, names in (
            ("missing from the files", info["missing_keys"]),
            ("in the files but not in the model", {key for key in info["unexpected_keys"] if not _MASK.search(key)}),
            ("of another shape than the model's", info["mismatched_keys"]),
        )
        if names
    ] + [str(message) for message in info.get("error_msgs") or []]
    if found:
        raise SkdError(
            f"the weights do not fit config.json; {'; '.join(found)}",
            where=str(path),
            hint="config.json and the weights must come from the same model and be complete",
        )


def check_stored(tensors: Sequence[StoredTensor], model: PreTrainedModel, path: Path) -> None:
    """Check that no two tensors stand for one weight, and that no integers are read as weights."""
    names, prefix = {tensor.name for tensor in tensors}, f"{model.base_model_prefix}."
    if twice := [name for name in names if prefix + name in names]:
        raise SkdError(
            f"{len(twice)} weights are in the files twice, with and without `{prefix}`: {_examples(twice)}",
            where=str(path),
            hint="save the model again",
        )
    if getattr(model.config, "quantization_config", None) is not None:
        return
    weights = {name for name, _ in model.named_parameters()}
    if integers := [tensor.name for tensor in tensors if tensor.dtype in _INTEGERS and tensor.name in weights]:
        raise SkdError(
            f"{len(integers)} weights are stored as integers, and config.json does not say how they are quantised: "
            + _examples(integers),
            where=str(path),
            hint="fetch the model's own config.json, or use weights that are not quantised",
        )


def check_finite(folder: Path, ignored: Collection[str] = ()) -> None:
    """Check that the floating-point weights of a folder hold no infinity and no NaN.

    Reads 128 MiB: all of a small model; of a larger one a few places of each tensor, its beginning and end included.
    Tensors whose names match the patterns `ignored` are those that the architecture does not load.
    """
    skip = re.compile("|".join(f"({pattern})" for pattern in ignored)) if ignored else None
    tensors = [
        tensor
        for tensor in stored_tensors(folder)
        if tensor.dtype in _EXPONENTS and tensor.shape and not (skip and skip.search(tensor.name))
    ]
    whole = sum(tensor.end - tensor.start for tensor in tensors) <= WHOLE
    sample = WHOLE if whole else WHOLE // (_PLACES * len(tensors))
    if broken := [tensor.name for tensor in tensors if not _is_finite(tensor, sample)]:
        raise SkdError(
            f"{len(broken)} weights are not finite (infinity or NaN): {', '.join(broken[:_EXAMPLES_SHOWN])}",
            where=str(folder),
            hint="fetch the model again; a training that went wrong, or a conversion to fp16, leaves such weights",
        )


def _is_finite(tensor: StoredTensor, sample: int) -> bool:
    """Return whether the elements of a tensor are finite, in each of a few places as many as fit into a sample."""
    words, exponent = _EXPONENTS[tensor.dtype]
    size = np.dtype(words).itemsize
    elements = (tensor.end - tensor.start) // size
    count = min(elements, max(sample // size, 1))
    with reading(tensor.file):
        for start in {(elements - count) * place // (_PLACES - 1) for place in range(_PLACES)}:
            found = np.fromfile(tensor.file, words, count, offset=tensor.start + start * size)
            if (found & words(exponent) == words(exponent)).any():
                return False
    return True


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers from printing what is raised as an error here, and bars for a moment's work."""
    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(logging.CRITICAL)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


def _examples(entries: Iterable[Any]) -> str:
    names = sorted(str(entry[0] if isinstance(entry, tuple) else entry) for entry in entries)
    return ", ".join(names[:_EXAMPLES_SHOWN]) + (", ..." if len(names) > _EXAMPLES_SHOWN else "")
