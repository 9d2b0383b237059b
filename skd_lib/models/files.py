"""What a model folder holds: config, tokenizer, and the headers and bytes of its safetensors files.

The weights are never loaded here, nor is torch for looking at them: what is wrong with a folder is found at once.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

from skd_lib.errors import SkdError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

_INDEX = "model.safetensors.index.json"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
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
    single, index = folder / "model.safetensors", folder / _INDEX
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


def describe(path: Path, *, trust_remote_code: bool = False) -> dict[str, int]:
    """Size of a stored model: `num_parameters`, `vocab_size` (rows of the embedding), `context_length` in tokens.

    Reads headers and config only. Weights that are tied but stored twice count once.
    """
    config = load_config(path, trust_remote_code=trust_remote_code).get_text_config()
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    return {
        "num_parameters": sum(math.prod(tensor.shape) for tensor in stored_tensors(path) if tensor.name not in tied),
        "vocab_size": int(config.vocab_size),
        "context_length": int(getattr(config, "max_position_embeddings", 0)),
    }


def load_config(path: Path, *, trust_remote_code: bool = False) -> PreTrainedConfig:
    """Load the config of a model folder.

    Raises:
        SkdError: there is none, or it is of no model that transformers knows.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code, local_files_only=True)
    except (ValueError, OSError, KeyError) as error:
        raise SkdError(f"cannot read its config.json: {error}", where=str(path)) from error


def load_tokenizer(path: Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model folder.

    Raises:
        SkdError: there is none, or it cannot be read.
    """
    check_model_folder(path, weights=False)
    from transformers import AutoTokenizer

    try:
        return cast(
            "PreTrainedTokenizerBase",
            AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code, local_files_only=True),
        )
    except (ValueError, OSError, KeyError) as error:
        raise SkdError(f"cannot load the tokenizer: {error}", where=str(path)) from error


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
