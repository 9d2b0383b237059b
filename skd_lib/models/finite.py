"""Whether stored weights are numbers: their bits are looked at in the files, a sample of them in large models."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from skd_lib.errors import SkdError
from skd_lib.models.files import StoredTensor, reading, stored_tensors

_EXPONENTS: dict[str, tuple[Any, int]] = {
    "F64": (np.uint64, 0x7FF0_0000_0000_0000),
    "F32": (np.uint32, 0x7F80_0000),
    "F16": (np.uint16, 0x7C00),
    "BF16": (np.uint16, 0x7F80),
}
"""Words of a dtype's size, and the bits that are all set in infinities and NaN alone."""
_WHOLE = 1 << 27
_SAMPLE = 1 << 16
_PLACES = 4
_LEAST = 1 << 10
_EXAMPLES_SHOWN = 5


def check_finite(folder: Path, ignored: Collection[str] = ()) -> bool:
    """See that the floating-point weights of a folder hold no infinity and no NaN.

    Reads 128 MiB: all of a small model; of a larger one a few places of each tensor, its first and last rows among
    them.

    Args:
        folder: Its `*.safetensors` files are read.
        ignored: Patterns of tensors that the architecture does not load.

    Returns:
        Whether everything was looked at.

    Raises:
        SkdError: there are such weights, or a file cannot be read.
    """
    skip = re.compile("|".join(f"({pattern})" for pattern in ignored)) if ignored else None
    tensors = [
        tensor
        for tensor in stored_tensors(folder)
        if tensor.dtype in _EXPONENTS and tensor.shape and not (skip and skip.search(tensor.name))
    ]
    whole = sum(tensor.end - tensor.start for tensor in tensors) <= _WHOLE
    sample = min(_SAMPLE, max(_LEAST, _WHOLE // (_PLACES * max(len(tensors), 1)))) if not whole else _WHOLE
    if broken := list(_broken(tensors, sample, whole=whole)):
        raise SkdError(
            f"{len(broken)} weights are not finite (infinity or NaN): {', '.join(broken[:_EXAMPLES_SHOWN])}",
            where=str(folder),
            hint="fetch the model again; a training that went wrong, or a conversion to fp16, leaves such weights",
        )
    return whole


def _broken(tensors: Sequence[StoredTensor], sample: int, *, whole: bool) -> Iterator[str]:
    for tensor in tensors:
        words, exponent = _EXPONENTS[tensor.dtype]
        with reading(tensor.file), tensor.file.open("rb") as file:
            for start, length in _pieces(tensor, sample, whole=whole):
                file.seek(start)
                found = np.frombuffer(file.read(length), dtype=words)
                if bool((found & words(exponent) == words(exponent)).any()):
                    yield tensor.name
                    break


def _pieces(tensor: StoredTensor, sample: int, *, whole: bool) -> Iterator[tuple[int, int]]:
    """Offsets and lengths of what is read of a tensor, in whole elements."""
    size = np.dtype(_EXPONENTS[tensor.dtype][0]).itemsize
    length = (tensor.end - tensor.start) // size * size
    if whole or length <= _PLACES * sample:
        for start in range(0, length, _SAMPLE * size):
            yield tensor.start + start, min(_SAMPLE * size, length - start)
        return
    sample = sample // size * size
    for place in range(_PLACES):
        start = (length - sample) * place // (_PLACES - 1) // size * size
        yield tensor.start + start, sample
