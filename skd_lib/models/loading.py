"""Models and tokenizers from and to folders in the Hugging Face layout, weights as safetensors only."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import math
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from skd_lib.errors import SkdError
from skd_lib.storage import atomic_directory, write_text_atomic

INDEX = "model.safetensors.index.json"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
_EXAMPLES_SHOWN = 5
_EAGER_ONLY = {"gemma2"}
_HASH_CHUNK = 1 << 22


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a safetensors file, as its header describes it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    end: int


def check_model_folder(folder: Path, *, weights: bool = True) -> None:
    """See that a folder holds a whole model: config, tokenizer, and weights as complete safetensors files.

    Args:
        folder: A model in the Hugging Face layout.
        weights: False where only config and tokenizer matter.

    Raises:
        SkdError: something is missing, cut off, or in a format that is not loaded.
    """
    where = str(folder)
    if not folder.is_dir():
        raise SkdError("no such folder", where=where, hint="check the path")
    if not (folder / "config.json").is_file():
        raise SkdError(
            "no config.json in it, so not a model in the Hugging Face layout",
            where=where,
            hint="name the folder that holds config.json, the tokenizer's files and *.safetensors",
        )
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise SkdError("no tokenizer in it", where=where, hint="save the model's tokenizer into the same folder")
    if weights:
        stored_tensors(folder)


def stored_tensors(folder: Path) -> list[StoredTensor]:
    """What the safetensors files of a folder hold, sorted by name; reads their headers only.

    Raises:
        SkdError: there are none, a shard is missing, or a file is cut off.
    """
    files = weight_files(folder)
    if not files:
        pickled = sorted([*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")])
        if pickled:
            raise SkdError(
                f"its weights are pickle files ({pickled[0].name}), which can run any code when they are loaded",
                where=str(folder),
                hint="convert them to safetensors: load the model in a sandbox, then `model.save_pretrained(...)`",
            )
        raise SkdError("no *.safetensors weights in it", where=str(folder), hint="name a folder with the weights in it")
    return sorted((tensor for file in files for tensor in _header(file)), key=lambda tensor: tensor.name)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that transformers would load from a folder; none if there are none.

    Raises:
        SkdError: the index of a sharded model is broken or names files that are not there.
    """
    single, index = folder / "model.safetensors", folder / INDEX
    if single.is_file():
        return [single]
    if not index.is_file():
        return []
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError) as error:
        raise SkdError("not an index of safetensors files", where=str(index)) from error
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise SkdError(
            f"{len(missing)} of {len(names)} weight files are missing, e.g. {missing[0]}",
            where=str(folder),
            hint="the download was not finished; fetch the model again",
        )
    return [folder / name for name in names]


def describe(path: Path, *, trust_remote_code: bool = False) -> dict[str, int]:
    """Size of a stored model: `num_parameters`, `vocab_size` (rows of the embedding), `context_length` in tokens.

    Reads headers and config only. Weights that are tied but stored twice count once.
    """
    config = _load_config(path, trust_remote_code).get_text_config()
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    return {
        "num_parameters": sum(math.prod(tensor.shape) for tensor in stored_tensors(path) if tensor.name not in tied),
        "vocab_size": int(config.vocab_size),
        "context_length": int(getattr(config, "max_position_embeddings", 0)),
    }


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
    error, not a warning. The generation config keeps its special ids only, so that no sampling default of a hub
    model (top_k, repetition penalty) can leak into what is sampled here.

    Args:
        path: Folder in the Hugging Face layout.
        dtype: The weights are converted to it.
        device: None for `default_device()`.
        quantization: Hold the linear layers but for the head in so many bits (bitsandbytes); they compute in `dtype`.
        trust_remote_code: Run Python code that comes with the model.

    Raises:
        SkdError: the folder is not a whole model, its weights do not fit its config, or they cannot be quantised here.
    """
    check_model_folder(path)
    place = torch.device(device) if device is not None else default_device()
    avoid_cudnn_attention()
    quantized: dict[str, Any] = {}
    if quantization is not None:
        check_quantization(quantization)
        quantized = {"quantization_config": _bits_and_bytes(quantization, dtype), "device_map": {"": place}}
    config = _load_config(path, trust_remote_code)
    attention = "eager" if config.get_text_config().model_type in _EAGER_ONLY else "sdpa"
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
    except (ValueError, SafetensorError) as error:
        raise SkdError(f"cannot load the model: {error}", where=str(path)) from error
    _check_loading_info(info, path)
    model.generation_config = without_sampling_defaults(model.generation_config)
    return cast(PreTrainedModel, (model if quantized else model.to(place)).eval())


def check_quantization(quantization: str) -> None:
    """See that models can be quantised to `8bit` or `4bit`.

    Raises:
        SkdError: bitsandbytes is missing.
    """
    where = f"teacher_precision {quantization}"
    if importlib.util.find_spec("bitsandbytes") is None:
        hint = "pip install 'skd-lib[quantization]', or use bf16"
        raise SkdError("quantised weights need the package bitsandbytes", where=where, hint=hint)


def _bits_and_bytes(quantization: str, dtype: torch.dtype) -> BitsAndBytesConfig:
    if quantization == "8bit":
        # It would tell of each product's cast to fp16.
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


def load_tokenizer(path: Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model folder.

    Raises:
        SkdError: there is none, or it cannot be read.
    """
    check_model_folder(path, weights=False)
    try:
        return cast(
            PreTrainedTokenizerBase,
            AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code, local_files_only=True),
        )
    except (ValueError, OSError, KeyError) as error:
        raise SkdError(f"cannot load the tokenizer: {error}", where=str(path)) from error


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: Path, card: str | None = None) -> None:
    """Save model and tokenizer as a folder that appears only when it is complete; one that is there is replaced.

    Args:
        model: Saved in the dtype it has.
        tokenizer: Saved with its chat template.
        path: The folder.
        card: Text of the model card (`README.md`).

    Raises:
        OSError: the folder cannot be written.
    """
    with atomic_directory(path) as folder:
        write_model(model, tokenizer, folder)
        if card is not None:
            write_text_atomic(folder / "README.md", card)


def write_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write model and tokenizer into an existing folder, without the sampling defaults of its generation config."""
    kept = model.generation_config
    plain = without_sampling_defaults(kept)
    plain.eos_token_id = list(eos_ids(model, tokenizer))
    plain.pad_token_id = pad_id(tokenizer)
    model.generation_config = plain
    try:
        model.save_pretrained(folder)
    finally:
        model.generation_config = kept
    tokenizer.save_pretrained(folder)
    mode = (folder / "config.json").stat().st_mode
    for file in folder.glob("*.safetensors"):
        file.chmod(mode)  # safetensors writes files that only their owner can read


def without_sampling_defaults(config: GenerationConfig | None) -> GenerationConfig:
    """A generation config with the special ids of `config` and nothing else: no temperature, top_k, penalties."""
    if config is None:
        return GenerationConfig()
    return GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )


def weights_digest(path: Path) -> str:
    """Hex sha256 over the weights of a model folder: each tensor's name, dtype, shape and bytes, sorted by name.

    The same weights have the same digest however they are cut into shards and whatever metadata the files carry.

    Raises:
        SkdError: the folder has no complete safetensors files.
    """
    digest = hashlib.sha256()
    for tensor in stored_tensors(path):
        digest.update(json.dumps([tensor.name, tensor.dtype, tensor.shape]).encode())
        with tensor.file.open("rb") as file:
            file.seek(tensor.start)
            left = tensor.end - tensor.start
            while left:
                chunk = file.read(min(left, _HASH_CHUNK))
                digest.update(chunk)
                left -= len(chunk)
    return digest.hexdigest()


def default_device() -> torch.device:
    """This process's GPU if there is one (`LOCAL_RANK` says which), else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def avoid_cudnn_attention() -> None:
    """Keep cuDNN out of PyTorch's attention in this process.

    On Hopper and later GPUs it would be first choice wherever there is a mask, and builds a plan, for tenths of a
    second, for every shape that it has not seen; batches of text hardly ever have the same shape twice.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)


def eos_ids(model: PreTrainedModel | Path, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Every id that ends a response: the tokenizer's (first), the generation config's and the config's.

    Chat models list several, e.g. Gemma's end of text and end of turn, and they are spread over these three places.

    Raises:
        SkdError: there is none, so no response would ever end.
    """
    if isinstance(model, Path):
        config, generation = _load_config(model, trust_remote_code=False), _load_generation_config(model)
    else:
        config, generation = model.config, model.generation_config
    found = [*_ids(tokenizer.eos_token_id), *_ids(getattr(generation, "eos_token_id", None))]
    found += _ids(getattr(config.get_text_config(), "eos_token_id", None))
    if not found:
        raise SkdError(
            "neither the tokenizer nor the model names an end-of-sequence token",
            where=str(model if isinstance(model, Path) else model.name_or_path),
            hint="set eos_token in tokenizer_config.json",
        )
    return tuple(dict.fromkeys(found))


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that fills up short rows: the padding token, or the end token where a tokenizer has no padding token.

    Raises:
        SkdError: the tokenizer has neither.
    """
    for candidate in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if candidate is not None:
            return int(candidate)
    raise SkdError(
        "the tokenizer has neither a padding nor an end-of-sequence token",
        where=str(tokenizer.name_or_path),
        hint="set pad_token or eos_token in tokenizer_config.json",
    )


def _load_config(path: Path, trust_remote_code: bool) -> Any:
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code, local_files_only=True)
    except (ValueError, OSError, KeyError) as error:
        raise SkdError(f"cannot read its config.json: {error}", where=str(path)) from error


def _load_generation_config(path: Path) -> GenerationConfig | None:
    if not (path / "generation_config.json").is_file():
        return None
    return GenerationConfig.from_pretrained(path, local_files_only=True)


def _ids(value: Any) -> list[int]:
    if value is None:
        return []
    return [int(one) for one in value] if isinstance(value, list | tuple) else [int(value)]


def _check_loading_info(info: dict[str, Any], path: Path) -> None:
    found = [
        f"{len(names)} {kind}: {', '.join(sorted(map(_tensor_name, names))[:_EXAMPLES_SHOWN])}"
        + (", ..." if len(names) > _EXAMPLES_SHOWN else "")
        for kind, names in (
            ("missing from the files", info["missing_keys"]),
            ("in the files but not in the model", info["unexpected_keys"]),
            ("of another shape than the model's", info["mismatched_keys"]),
        )
        if names
    ]
    if found:
        raise SkdError(
            f"the weights do not fit config.json; {'; '.join(found)}",
            where=str(path),
            hint="config.json and the weights must come from the same model and be complete",
        )


def _tensor_name(entry: Any) -> str:
    return str(entry[0] if isinstance(entry, tuple) else entry)


def _header(path: Path) -> Iterator[StoredTensor]:
    """The tensors of one file. Format: 8 bytes little-endian header length, JSON header, the tensors' bytes."""
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
        if 8 + length > size:
            raise _cut_off(path)
        try:
            entries = json.loads(file.read(length))
        except ValueError as error:
            raise SkdError("not a safetensors file", where=str(path), hint="fetch the model again") from error
    entries.pop("__metadata__", None)
    begin = 8 + length
    if begin + max((entry["data_offsets"][1] for entry in entries.values()), default=0) != size:
        raise _cut_off(path)
    for name, entry in entries.items():
        start, end = entry["data_offsets"]
        yield StoredTensor(name, entry["dtype"], tuple(entry["shape"]), path, begin + start, begin + end)


def _cut_off(path: Path) -> SkdError:
    return SkdError(
        "the weights file is cut off or not a safetensors file",
        where=str(path),
        hint="the download was not finished (or is a git-lfs pointer); fetch the model again",
    )
