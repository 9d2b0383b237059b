"""Norms and rotary positions as one kernel each, for rounds that are captured as CUDA graphs.

Between two matrix products a decoder layer launches a dozen kernels that move a few kilobytes each: at 8 rows they
took nearly as long as the products (docs/benchmarks.md). `torch.compile` makes one of those of a norm, and one of the
rotation of queries and keys. Matrix products, attention and the cache stay as they are, so that what is compiled does
not depend on the number of layers, on lengths or on the cache; it takes some seconds, once a process.

A graph keeps the kernels that it was captured with, so models need to be changed only while one is captured.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache as once
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

_ROTATE = "apply_rotary_pos_emb"
"""What transformers' modeling files call the rotation of (B, heads, T, head_dim) queries and keys."""


@contextmanager
def fused(models: Sequence[PreTrainedModel], backend: str | Callable[..., Any] = "inductor") -> Iterator[None]:
    """Within, these models' norms and rotary positions are compiled; where that fails, they are as they were.

    Not for gradients, and not while another thread runs a model.

    Args:
        models: Causal language models of `transformers`, bare or wrapped by PEFT.
        backend: Of `torch.compile`.
    """
    norms: dict[nn.Module, Callable[[nn.Module, Tensor], Tensor]] = {}
    attentions: set[str] = set()
    for model in models:
        for module in model.modules():
            kind: type[nn.Module] = type(module)
            name = kind.__name__
            if name.endswith("RMSNorm") and not isinstance(module, nn.RMSNorm) and "forward" not in vars(module):
                norms[module] = _norm(kind, backend)  # type: ignore[arg-type]  # mypy takes the class for one of its modules
            elif name.endswith("Attention"):
                attentions.add(kind.__module__)
    with ExitStack() as changed, torch._dynamo.config.patch(suppress_errors=True, recompile_limit=64):
        for module, forward in norms.items():
            module.forward = forward.__get__(module)
            changed.callback(vars(module).pop, "forward")
        for name in attentions:
            modeling = sys.modules[name]
            rotate = getattr(modeling, _ROTATE, None)
            if rotate is not None and list(inspect.signature(rotate).parameters)[:4] == ["q", "k", "cos", "sin"]:
                setattr(modeling, _ROTATE, _rotation(rotate, backend))
                changed.callback(setattr, modeling, _ROTATE, rotate)
        yield


@once
def _norm(kind: type[nn.Module], backend: str | Callable[..., Any]) -> Callable[[nn.Module, Tensor], Tensor]:
    """`kind.forward` of (..., H) states, compiled for any number of rows."""
    compiled = torch.compile(kind.forward, dynamic=True, backend=backend)

    def forward(module: nn.Module, states: Tensor) -> Tensor:
        out: Tensor = compiled(module, states.reshape(-1, states.shape[-1]))
        return out.view(states.shape)

    return forward


@once
def _rotation(
    rotate: Callable[..., tuple[Tensor, Tensor]], backend: str | Callable[..., Any]
) -> Callable[..., tuple[Tensor, Tensor]]:
    """`rotate`, compiled for any number of rows and positions."""
    compiled = torch.compile(rotate, dynamic=True, backend=backend)

    def rotation(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *rest: Any, **named: Any) -> tuple[Tensor, Tensor]:
        batch, _, positions, _ = q.shape
        if rest or named or cos.shape[:2] != (batch, positions):
            return rotate(q, k, cos, sin, *rest, **named)
        # (B, heads, T, d) -> (B x T, heads, d), which is how it lies in memory.
        rows = [x.transpose(1, 2).flatten(0, 1) for x in (q, k)]
        turned = compiled(*rows, cos.flatten(0, 1), sin.flatten(0, 1))
        q, k = (x.reshape(batch, positions, *x.shape[1:]).transpose(1, 2) for x in turned)
        return q, k

    return rotation
