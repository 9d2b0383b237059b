"""Content of a model folder: config, tokenizer, and the headers and bytes of its safetensors files.

Neither weights nor torch are loaded here, so that errors of a folder are found at once.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import struct
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

from skd_lib.config.models import ServedTeacher
from skd_lib.errors import SkdError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

SERVED = "served.json"
"""File in the place of weights: the server that has them."""
_INDEX = "model.safetensors.index.json"
_HEAD = "lm_head.weight"
_EMBEDDING = re.compile(r"(embed|wte|word_embeddings)[^.]*\.weight$")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
_ADAPTER = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
_HASH_CHUNK = 1 << 22
_PIECE = 256
_REASON_SHOWN = 300


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a safetensors file, from the file's header."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    end: int


def check_model_folder(folder: Path, *, weights: bool = True) -> None:
    """Check that a folder holds a whole model: config, tokenizer, and `weights` as complete safetensors files."""
    where = str(folder)
    with reading(folder):
        if not folder.is_dir():
            raise SkdError("no such folder", where=where, hint="check the path")
        if adapter := next((name for name in _ADAPTER if (folder / name).is_file()), None):
            raise _adapter_found(folder, adapter)
        if not (folder / "config.json").is_file():
            raise SkdError(
                "no config.json in it, so not a model in the Hugging Face layout",
                where=where,
                hint="name the folder that holds config.json, the tokenizer's files and *.safetensors",
            )
        if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
            raise SkdError("no tokenizer in it", where=where, hint="save the model's tokenizer into the same folder")
        if weights and served_in(folder) is None:
            stored_tensors(folder)


def served_in(folder: Path) -> ServedTeacher | None:
    """Return the server that a folder without weights stands for; None for any other folder."""
    file = folder / SERVED
    return ServedTeacher.model_validate_json(file.read_text(encoding="utf-8")) if file.is_file() else None


def without_weights(served: ServedTeacher) -> SkdError:
    """Return the error of a served model whose weights are asked for."""
    hint = "name a model with weights; one on a server can be a run's `teacher`, with supervised_kd or seqkd"
    return SkdError("a server gives its answers, not its weights", where=str(served), hint=hint)


def stored_tensors(folder: Path) -> list[StoredTensor]:
    """Return the tensors in the safetensors files of a folder, sorted by name; reads headers only."""
    with reading(folder):
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
    tensors = sorted((tensor for file in files for tensor in _header(file)), key=lambda tensor: tensor.name)
    twice = [name for name, count in Counter(tensor.name for tensor in tensors).items() if count > 1]
    if twice:
        raise SkdError(
            f"{len(twice)} tensors are in more than one weight file, e.g. {twice[0]}",
            where=str(folder),
            hint="remove the files that another model left there, or save the model again",
        )
    return tensors


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files that transformers would load from a folder."""
    single, index = folder / "model.safetensors", folder / _INDEX
    if single.is_file():
        return [single]
    if not index.is_file():
        return []
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        if any(Path(name).name != name for name in names):
            raise ValueError("names of files elsewhere")
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise SkdError(
            "not an index of safetensors files", where=str(index), hint="fetch the model again, or save it again"
        ) from error
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise SkdError(
            f"{len(missing)} of {len(names)} weight files are missing, e.g. {missing[0]}",
            where=str(folder),
            hint="the download was not finished; fetch the model again",
        )
    return [folder / name for name in names]


def weights_digest(path: Path) -> str:
    """Return the hex sha256 over the weights of a model folder: each tensor's name, dtype, shape and bytes, sorted.

    The same weights have the same digest however they are cut into shards and whatever metadata the files carry. Of a
    served model it is the digest of the server's address and the model's name.
    """
    digest = hashlib.sha256()
    if served := served_in(path):
        digest.update(str(served).encode())
        return digest.hexdigest()
    for tensor in stored_tensors(path):
        digest.update(json.dumps([tensor.name, tensor.dtype, tensor.shape]).encode())
        for chunk in _chunks(tensor):
            digest.update(chunk)
    return digest.hexdigest()


def weights_sample(path: Path) -> str:
    """Return the hex sha256 of the same as `weights_digest`, with three pieces of each tensor's bytes in their place.

    It takes seconds for any model, and tells models of equal shapes apart that were trained differently.
    """
    digest = hashlib.sha256()
    for tensor in stored_tensors(path):
        digest.update(json.dumps([tensor.name, tensor.dtype, tensor.shape]).encode())
        with reading(tensor.file), tensor.file.open("rb") as file:
            for start in (tensor.start, (tensor.start + tensor.end) // 2, tensor.end - _PIECE):
                file.seek(max(start, tensor.start))
                digest.update(file.read(min(_PIECE, tensor.end - file.tell())))
    return digest.hexdigest()


def describe(path: Path) -> dict[str, int]:
    """Return a stored model's `num_parameters`, `vocab_size` (rows of the embedding) and `context_length` in tokens.

    Reads headers and config, and the embeddings where it must. Weights that are tied but stored twice count once.
    """
    config = load_config(path).get_text_config(decoder=True)
    tied = {_HEAD} if getattr(config, "tie_word_embeddings", False) and not has_own_head(path) else set()
    return {
        "num_parameters": sum(math.prod(tensor.shape) for tensor in stored_tensors(path) if tensor.name not in tied),
        "vocab_size": int(config.vocab_size),
        "context_length": context_length(config) or 0,
    }


def context_length(config: PreTrainedConfig) -> int | None:
    """Return the most positions that a config's model takes; None if they are not limited."""
    limit: int | None = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    return limit


def has_own_head(path: Path) -> bool:
    """Return whether a folder's weights hold a head that is no copy of the embedding, tied in config.json or not.

    Transformers keeps both where they differ. Reads their bytes only if both are there.
    """
    tensors = stored_tensors(path)
    head = next((tensor for tensor in tensors if tensor.name == _HEAD), None)
    if head is None:
        return False
    embeddings = [tensor for tensor in tensors if _EMBEDDING.search(tensor.name) and tensor.shape == head.shape]
    return bool(embeddings) and not any(
        tensor.dtype == head.dtype
        and all(one == other for one, other in zip(_chunks(head), _chunks(tensor), strict=True))
        for tensor in embeddings
    )


def load_config(path: Path, *, trust_remote_code: bool = False) -> PreTrainedConfig:
    """Load the config of a model folder, without the kind of attention it names, which this machine may not have."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code, local_files_only=True)
        config._attn_implementation = None
    except Exception as error:  # whatever a config's fields make its class do
        raise SkdError(
            f"cannot read its config.json: {reason(error)}",
            where=str(path),
            hint="fetch the model again; where its type is new, a newer transformers may know it",
        ) from error
    return config


def load_tokenizer(path: Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model folder."""
    check_model_folder(path, weights=False)
    from transformers import AutoTokenizer

    try:
        return cast(
            "PreTrainedTokenizerBase",
            AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code, local_files_only=True),
        )
    except Exception as error:  # tokenizers raises plain ones
        raise SkdError(
            f"cannot load the tokenizer: {reason(error)}",
            where=str(path),
            hint="fetch tokenizer.json and tokenizer_config.json again, or save the model's tokenizer there",
        ) from error


def reason(error: BaseException) -> str:
    """Return a library's error message on one line, or the error's type where it has none."""
    text = " ".join(str(error).split())
    return (text if len(text) <= _REASON_SHOWN else f"{text[:_REASON_SHOWN]} ...") or type(error).__name__


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Raise an `OSError` as an `SkdError` that names the file."""
    try:
        yield
    except OSError as error:
        raise SkdError(
            f"{Path(error.filename or path).name} cannot be read: {error.strerror or error}",
            where=str(error.filename or path),
            hint="check its permissions and the disk",
        ) from error


def _header(path: Path) -> list[StoredTensor]:
    """Return the tensors of one file. Format: 8 bytes little-endian header length, JSON header, the tensors' bytes."""
    from safetensors import SafetensorError, safe_open  # the steps' options are read where it is not installed

    with reading(path):
        try:
            with safe_open(path, framework="numpy"):  # it checks the whole header
                pass
        except SafetensorError as error:
            raise _cut_off(path, f": {reason(error)}") from error
        with path.open("rb") as file:
            length = struct.unpack("<Q", file.read(8))[0]
            entries = json.loads(file.read(length))
    entries.pop("__metadata__", None)
    return [
        StoredTensor(
            name, entry["dtype"], tuple(entry["shape"]), path, *(8 + length + at for at in entry["data_offsets"])
        )
        for name, entry in entries.items()
    ]


def _chunks(tensor: StoredTensor) -> Iterator[bytes]:
    """Yield the bytes of a tensor."""
    with reading(tensor.file), tensor.file.open("rb") as file:
        file.seek(tensor.start)
        left = tensor.end - tensor.start
        while left > 0:
            chunk = file.read(min(left, _HASH_CHUNK))
            if not chunk:
                raise _cut_off(tensor.file)
            yield chunk
            left -= len(chunk)


def _adapter_found(folder: Path, name: str) -> SkdError:
    """Return the error for a folder with an adapter: nothing says whether it is merged into the weights already."""
    merge = "PeftModel.from_pretrained(base, adapter).merge_and_unload().save_pretrained(folder)"
    if not (folder / "config.json").is_file():
        return SkdError(
            f"it holds an adapter ({name}), not a model",
            where=str(folder),
            hint=f"merge it into its base model and save that with its tokenizer: `{merge}`",
        )
    return SkdError(
        f"it holds a model and an adapter ({name}), which would be applied when the model is loaded",
        where=str(folder),
        hint="if the adapter is merged into the weights already, remove its files adapter_config.json and "
        f"adapter_model.*; if not, merge it: `{merge}`",
    )


def _cut_off(path: Path, why: str = "") -> SkdError:
    return SkdError(
        f"the weights file {path.name} is cut off or not a safetensors file{why}",
        where=str(path),
        hint="the download was not finished (or is a git-lfs pointer); fetch the model again",
    )
