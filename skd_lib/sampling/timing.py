"""The least time of a sampling run: that of its forwards alone, without anything around them.

The engine's forwards are recorded (rows, tokens, cached positions, positions at the head) and run again on a cache
without ragged rows: no drawing, no acceptance, no bookkeeping. On a CUDA GPU they are replayed as graphs: their
launches alone would otherwise take longer than the engine does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache

from skd_lib.models.heads import decoder, lm_logits
from skd_lib.sampling.cache import RowCache, RowLayer, Window, attention_mask


@dataclass
class Forward:
    """One forward pass: `tokens` positions in each of `rows` rows, of `visible` positions; the head sees `at_head`."""

    model: PreTrainedModel
    rows: int
    tokens: int
    visible: int
    at_head: int = 0


@contextmanager
def recorded(*models: PreTrainedModel) -> Iterator[list[Forward]]:
    """Note the forwards that the engine makes inside the `with` block; forwards on other caches are left out."""
    forwards: list[Forward] = []

    def at_decoder(model: PreTrainedModel) -> Callable[..., None]:
        def hook(module: Any, args: Any, kwargs: dict[str, Any]) -> None:  # noqa: ARG001 - torch's signature
            cache = kwargs.get("past_key_values")
            if isinstance(cache, RowCache):
                rows, tokens = kwargs["input_ids"].shape
                forwards.append(Forward(model, rows, tokens, cache.block.visible))

        return hook

    def at_head(module: Any, args: tuple[Tensor]) -> None:  # noqa: ARG001 - torch's signature
        if forwards:
            forwards[-1].at_head = args[0].shape[:-1].numel()

    with ExitStack() as hooks:
        for model in models:
            stack = decoder(model)
            hooks.callback(stack.register_forward_pre_hook(at_decoder(model), with_kwargs=True).remove)
            hooks.callback(model.get_output_embeddings().register_forward_pre_hook(at_head).remove)
        yield forwards


def bare(forwards: Sequence[Forward]) -> Callable[[], None]:
    """Return a function that runs these forwards and nothing else; their inputs are made here, before."""
    models = {id(forward.model): forward.model for forward in forwards}
    caches = {}
    for key, model in models.items():
        own = [forward for forward in forwards if forward.model is model]
        shape = max(forward.rows for forward in own), max(forward.visible for forward in own)
        caches[key] = _SlabCache(model.config.get_text_config(decoder=True), *shape)
    calls: list[Callable[[], None]] = []
    for forward in forwards:
        device = forward.model.device
        positions_1T = torch.arange(forward.visible - forward.tokens, forward.visible, device=device).unsqueeze(0)
        inputs = {
            "input_ids": torch.zeros(forward.rows, forward.tokens, dtype=torch.long, device=device),
            "position_ids": positions_1T.expand(forward.rows, -1),
            "attention_mask": attention_mask(forward.model, positions_1T, forward.visible),
        }
        calls.append(partial(_forward, forward, caches[id(forward.model)], inputs))

    @torch.no_grad()
    def run() -> None:
        for call in calls:
            call()

    if any(model.device.type != "cuda" for model in models.values()):
        return run
    with torch.no_grad():
        for key in models:  # what is set up in a first call, the cache's memory too, must not be captured
            next(call for forward, call in zip(forwards, calls, strict=True) if id(forward.model) == key)()
    return _captured(calls)


def _forward(forward: Forward, cache: _SlabCache, inputs: dict[str, Any]) -> None:
    cache.block.visible = forward.visible
    hidden_BTH = decoder(forward.model)(past_key_values=cache, use_cache=True, **inputs).last_hidden_state
    if forward.at_head:
        lm_logits(forward.model, hidden_BTH[:, -(forward.at_head // forward.rows) :])


_FORWARDS_A_GRAPH = 32


@torch.no_grad()
def _captured(calls: Sequence[Callable[[], None]]) -> Callable[[], None]:
    """Capture all calls as CUDA graphs, several calls each."""
    pool = torch.cuda.graph_pool_handle()
    graphs = []
    for start in range(0, len(calls), _FORWARDS_A_GRAPH):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            for call in calls[start : start + _FORWARDS_A_GRAPH]:
                call()
        graphs.append(graph)

    def replay() -> None:
        for graph in graphs:
            graph.replay()

    return replay


class _SlabCache(Cache):
    """Keys and values at the same positions in all rows, in memory that is allocated once."""

    def __init__(self, config: PreTrainedConfig, rows: int, capacity: int) -> None:
        self.block = Window()
        super().__init__(layers=[_SlabLayer(self.block, rows, capacity) for _ in range(config.num_hidden_layers)])


class _SlabLayer(RowLayer):
    """Copies slices, where `RowLayer` scatters."""

    def __init__(self, block: Window, rows: int, capacity: int) -> None:
        super().__init__(block, capacity)
        self.rows = rows

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate for all rows, in the shape and dtype of the first states that arrive."""
        self.replace(
            *(x.new_zeros(self.rows, x.shape[1], self.capacity, x.shape[3]) for x in (key_states, value_states))
        )

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Write (B, kv_heads, T, head_dim) states at the last visible positions; return all up to there."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        rows, end = len(key_states), self.block.visible
        self.keys[:rows, :, end - key_states.shape[2] : end] = key_states
        self.values[:rows, :, end - key_states.shape[2] : end] = value_states
        return self.keys[:rows, :, :end], self.values[:rows, :, :end]
