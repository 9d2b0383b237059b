"""Choice of the precision in which models compute on this machine, for all parts of a run.

bf16 pays where a device has units that multiply matrices in it. A CPU with `avx512_bf16` alone has vector instructions
for it, with which a training step took 0.64 times as long as in fp32 on one CPU (an AMD EPYC) and 1.6 to 1.9 times on
another (a Xeon): there `auto` is fp32, which is never wrong, and gives the same numbers on all of them.
"""

from __future__ import annotations

import os
from typing import Literal

import torch

from skd_lib.config import Precision
from skd_lib.errors import SkdError

VARIABLE = "SKD_PRECISION"
"""Environment variable that sets the meaning of `auto` on this machine: `fp32` or `bf16`."""
Resolved = Literal["fp32", "bf16"]
DTYPES: dict[Resolved, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}


def resolve_precision(wanted: Precision, device: torch.device) -> Resolved:
    """Return the precision that `wanted` means on a device.

    `auto` is the value of `SKD_PRECISION`, else bf16 where `multiplies_in_bf16`, else fp32. A precision asked for by
    name is kept, also where it is slow (see `precision_trouble`).
    """
    resolved = wanted
    if resolved == "auto":
        resolved = _pinned() or ("bf16" if multiplies_in_bf16(device) else "fp32")
    if resolved == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        where = "precision bf16" if wanted == "bf16" else f"environment variable {VARIABLE}"
        raise SkdError(f"{_name(device)} cannot compute in bf16", where=where, hint="use fp32")
    return resolved


def compute_dtype(wanted: Precision, device: torch.device) -> torch.dtype:
    """Return the dtype of `resolve_precision`, and raise its errors."""
    return DTYPES[resolve_precision(wanted, device)]


def multiplies_in_bf16(device: torch.device) -> bool:
    """Return whether the device has units that multiply matrices in bf16.

    GPUs from Ampere on do, and CPUs with AMX. PyTorch before 2.10 cannot say what a CPU has: then the answer is no.
    """
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type != "cpu" or not hasattr(torch.cpu, "get_capabilities"):
        return False
    return bool(torch.cpu.get_capabilities().get("amx_bf16", False))


def precision_trouble(wanted: Precision, device: torch.device) -> str:
    """Return why `wanted` is a poor choice on a device, as a sentence; empty if it is none."""
    if resolve_precision(wanted, device) == "fp32" or multiplies_in_bf16(device):
        return ""
    return f"{_name(device)} has no units that multiply matrices in bf16: it is often slower than fp32 there"


def _pinned() -> Resolved | None:
    pinned = os.environ.get(VARIABLE, "")
    if pinned and pinned not in DTYPES:
        hint = "set it to fp32 or bf16, or unset it to let skd choose"
        raise SkdError(f"must be fp32 or bf16, got {pinned!r}", where=f"environment variable {VARIABLE}", hint=hint)
    return pinned or None


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "this CPU"
