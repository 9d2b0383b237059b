"""Loading and saving of models in the Hugging Face layout, weights as safetensors only."""

from __future__ import annotations

import importlib.util
import logging
import os
from pathlib import Path
from typing import Any, Literal, cast

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase

from skd_lib.errors import SkdError
from skd_lib.models.files import check_model_folder, load_config, reason, served_in, stored_tensors, without_weights
from skd_lib.models.heads import check_supported, embedding_rows
from skd_lib.models.skeleton import check_decoder_only, check_loaded, check_stored, follow_ties
from skd_lib.models.vocabulary import eos_ids, pad_id, stored_generation_config, without_sampling_defaults
from skd_lib.storage import atomic_directory, write_text_atomic

_EAGER_ONLY = {"gemma2"}
_BLOCK = 64
"""Weights that have a scale in common, in bitsandbytes' 4 bits."""


def load_model(
    path: Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    quantization: Literal["8bit", "4bit"] | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Load a causal language model, in eval mode.

    Every weight of the model must be in the files and the other way round: a model that is partly random is an
    error, not a warning. Its decoder and head, as they are used here, must give its own logits. Where the files hold
    a head of its own although the config ties it to the embedding, the config is corrected. The generation config
    keeps its special ids only, so that no sampling default of a hub model (top_k, repetition penalty) affects samples.
    Quantised are the linear layers except the head (bitsandbytes); they compute in `dtype`.
    """
    check_model_folder(path)
    if served := served_in(path):
        raise without_weights(served)
    stored_generation_config(path)  # transformers would leave out a broken one in silence
    place = torch.device(device) if device is not None else default_device()
    avoid_cudnn_attention()
    config = load_config(path, trust_remote_code=trust_remote_code)
    check_decoder_only(config, path)
    quantized: dict[str, Any] = {}
    if quantization is not None:
        check_quantization(quantization, path, place, trust_remote_code=trust_remote_code)
        quantized = {"quantization_config": _bits_and_bytes(quantization, dtype), "device_map": {"": place}}
    # None: PyTorch's own, or eager for an architecture that cannot use it (GPT-OSS, BLOOM).
    attention = "eager" if config.get_text_config().model_type in _EAGER_ONLY else None
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            path,
            config=config,
            dtype=dtype,
            attn_implementation=attention,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            local_files_only=True,
            ignore_mismatched_sizes=True,  # not ignored: reported below, with the missing ones
            output_loading_info=True,
            **quantized,
        )
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever an architecture's code makes of its files
        raise SkdError(
            f"cannot load the model: {reason(error)}", where=str(path), hint="fetch the model again, all of its files"
        ) from error
    check_loaded(info, path)
    check_stored(stored_tensors(path), model, path)
    _compute_as_asked(model)
    follow_ties(model)
    model.generation_config = without_sampling_defaults(model.generation_config)
    loaded = cast(PreTrainedModel, (model if quantized else model.to(place)).eval())
    try:
        check_supported(loaded)
    except SkdError as error:
        raise SkdError(error.what, where=str(path), hint=error.hint) from error
    return loaded


def check_quantization(quantization: str, path: Path, device: torch.device, *, trust_remote_code: bool = False) -> None:
    """Check that a model, whose weights need not be there, can be quantised to `8bit` or `4bit` on a device."""
    where = f"teacher_precision {quantization}"
    if importlib.util.find_spec("bitsandbytes") is None:
        hint = "pip install 'skd-lib[quantization]', or use bf16"
        raise SkdError("quantised weights need the package bitsandbytes", where=where, hint=hint)
    if quantization != "4bit" or device.type != "cpu":
        return
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            load_config(path, trust_remote_code=trust_remote_code), trust_remote_code=trust_remote_code
        )
    head = model.get_output_embeddings()
    # On CPUs rows that are no whole blocks get wrong scales.
    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear) and layer is not head and layer.in_features % _BLOCK:
            what = (
                f"layer {name} of {path} has {layer.in_features} inputs, no multiple of the {_BLOCK} weights of a block"
            )
            raise SkdError(what, where=where, hint="use 8bit or fp32 on this machine, or a GPU")


def _bits_and_bytes(quantization: str, dtype: torch.dtype) -> BitsAndBytesConfig:
    if quantization == "8bit":
        # It would log each product's cast to fp16.
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


def _compute_as_asked(model: PreTrainedModel) -> None:
    """Make 4-bit layers compute in their own dtype on every CPU.

    On one with AVX512_BF16, bitsandbytes packs weights again for a kernel that always computes in bf16, and that fails
    for a layer whose outputs are not a multiple of 32.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: Path, card: str | None = None) -> None:
    """Save model, tokenizer and the text of the model card as a folder, which appears only when it is complete."""
    with atomic_directory(path) as folder:
        write_model(model, tokenizer, folder)
        if card is not None:
            write_text_atomic(folder / "README.md", card)


def write_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write model and tokenizer into an existing folder, without the sampling defaults of its generation config."""
    kept = model.generation_config
    plain = without_sampling_defaults(kept)
    plain.eos_token_id = list(eos_ids(model, tokenizer))
    plain.pad_token_id = pad_id(tokenizer, embedding_rows(model))
    model.generation_config = plain
    try:
        model.save_pretrained(folder)
    finally:
        model.generation_config = kept
    tokenizer.save_pretrained(folder)
    mode = (folder / "config.json").stat().st_mode
    for file in folder.glob("*.safetensors"):
        file.chmod(mode)  # safetensors writes files that only their owner can read


def default_device() -> torch.device:
    """Return this process's GPU if there is one (of the index `LOCAL_RANK`), else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def avoid_cudnn_attention() -> None:
    """Keep cuDNN out of PyTorch's attention in this process.

    On Hopper and later GPUs it is the first choice for attention with a mask, and spends tenths of a second on a plan
    for every new shape; batches of text hardly ever have the same shape twice.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)
