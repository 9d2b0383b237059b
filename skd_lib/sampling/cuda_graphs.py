"""Rounds as CUDA graphs: on a GPU a round's thousands of small launches cost more than its arithmetic.

A graph repeats the very kernels of the round it was captured from, on the same memory. So the rows live in memory that
stays (`StaticRows`), and there is one graph for each shape: rows (a power of two), drafted tokens, and visible
positions in steps of `BUCKET`, which attention reads whether or not a row has come so far. Capturing costs about as
much as a round without a graph; graphs and memory are kept for the sampler's life, across calls.

Memory: both caches at the largest batch and length so far, the largest graph's activations, which all graphs share
since they run one after the other, and under autocast one cast copy of the weights.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cache as once
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from skd_lib.sampling.cache import keeps_rows, stretches
from skd_lib.sampling.round import Verdict
from skd_lib.sampling.samples import CACHES, PER_ROW, Rows

log = logging.getLogger(__name__)

BUCKET = 64
"""Visible positions are rounded up to a multiple of this."""

Round = Callable[[Rows, Tensor, int], Verdict]
"""(rows, uniforms_BSC, gamma) -> verdict, as `skd_lib.sampling.round.Interleaving.round`."""


@dataclass
class StaticRows(Rows):
    """The first of the rows that stay at their place in memory; the other rows are idle.

    Attributes:
        base: All rows. A round computes idle rows as rows of one token, and their results are discarded.
    """

    base: Rows

    @classmethod
    def of(cls, base: Rows, count: int, longest: int) -> StaticRows:
        """Return the first `count` rows of `base`."""
        return cls(**_first(base, count), longest=longest, base=base)

    def select(self, keep: Tensor) -> StaticRows:
        """Keep only these rows, moved to the front."""
        count = len(keep)
        for name in PER_ROW:
            getattr(self.base, name)[:count] = getattr(self, name)[keep]
            getattr(self.base, name)[count:] = 1
        for name in CACHES:
            if (cache := getattr(self, name)) is not None:
                cache.select(keep)
                getattr(self.base, name).write(0, cache)
        return StaticRows.of(self.base, count, self.longest)

    def extend(self, other: Rows) -> StaticRows:
        """Append rows that were just prefilled."""
        count = len(self.index_B)
        total = count + len(other.index_B)
        for name in PER_ROW:
            getattr(self.base, name)[count:total] = getattr(other, name)
        for name in CACHES:
            if (cache := getattr(other, name)) is not None:
                getattr(self.base, name).write(count, cache)
        return StaticRows.of(self.base, total, max(self.longest, other.longest))

    def shape(self, block: int, capacity: int) -> tuple[int, int]:
        """Return the number of rows that a round computes, and the longest row that it has room for.

        Idle rows fill up to a power of two, and all rows are read up to the end of the next bucket, within the
        capacity. A round adds `block` positions to the longest row.
        """
        visible = min(-(-(self.longest + block) // BUCKET) * BUCKET, capacity)
        return min(1 << (len(self.index_B) - 1).bit_length(), len(self.base.index_B)), visible - block

    def padded(self, batch: int, longest: int) -> Rows:
        """Return these rows and idle ones, in a shape that `shape` returned."""
        return Rows(**_first(self.base, batch), longest=longest)


def allocate(like: Rows, batch: int, capacity: int) -> Rows:
    """Make rows of one token, in memory like that of `like` but of another size."""
    parts: dict[str, Any] = {}
    for name in PER_ROW:
        parts[name] = getattr(like, name).new_ones(batch, *getattr(like, name).shape[1:])
    for name in CACHES:
        cache = getattr(like, name)
        parts[name] = None if cache is None else cache.empty(batch, capacity)
    return Rows(**parts, longest=1)


Capture = Callable[[Callable[[], Verdict]], tuple[Callable[[], object], Verdict]]
"""(a round) -> (a function that plays it again on the same memory, where its verdict then is)"""


class CudaGraphs:
    """Captures rounds as CUDA graphs. All take their memory from one pool: only one's verdict lasts at a time.

    A pool is gone with the last of its graphs, and its name cannot be used again: graphs that are given up are to be
    followed by those of a new object.
    """

    def __init__(self) -> None:
        self._pool: Any = torch.cuda.graph_pool_handle()

    def __call__(self, play: Callable[[], Verdict]) -> tuple[Callable[[], object], Verdict]:
        """Capture one round; it is played once before, so that what is set up in a first call is not captured."""
        current, stream = torch.cuda.current_stream(), _stream(torch.cuda.current_device())
        graph = torch.cuda.CUDAGraph()
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            play()
        current.wait_stream(stream)
        try:
            with torch.cuda.graph(graph, pool=self._pool, stream=stream):
                verdict = play()
        finally:
            torch.cuda.set_stream(current)  # a capture that fails leaves its own stream behind
        return graph.replay, verdict


@once
def _stream(device: int) -> Any:  # noqa: ARG001 - one for each device
    """Return the one stream of all captures: cuBLAS keeps a workspace for every stream that it has seen."""
    return torch.cuda.Stream()  # type: ignore[no-untyped-call]


class GraphedRounds:
    """Plays rounds, each shape captured once and replayed from then on.

    Args:
        play: One round, without a graph.
        models: The models whose weights the graphs read. Weights may change in place, as an optimiser changes them; if
            they have moved, rounds are captured again.
        capturing: Makes a `Capture`; called again after graphs were given up.
    """

    def __init__(self, play: Round, models: list[PreTrainedModel], capturing: Callable[[], Capture]) -> None:
        self._play, self._models, self._capturing = play, models, capturing
        self._works = True
        self.clear()

    @staticmethod
    def serve(models: list[PreTrainedModel]) -> bool:
        """Return True if rounds of these models can be captured."""
        return all(model.device.type == "cuda" and keeps_rows(model) and not stretches(model) for model in models)

    @property
    def captured(self) -> int:
        """Return the number of graphs; 0 after a capture that failed."""
        return len(self._graphs) if self._works else 0

    def clear(self) -> None:
        """Give back all memory."""
        self._base: Rows | None = None
        self._size = (0, 0)
        self._settings: object = None
        self._forget_graphs()

    def _forget_graphs(self) -> None:
        self._graphs: dict[tuple[int, ...], tuple[Callable[[], object], Tensor, Verdict]] = {}
        self._capture: Capture | None = None

    def adopt(self, rows: Rows, batch: int, capacity: int) -> StaticRows:
        """Move rows that were just prefilled to memory that stays, with room for `batch` rows."""
        settings = (_placement(self._models), torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda"))
        if settings != self._settings:
            self.clear()  # the cache's dtype may be another one, too
            self._settings = settings
        if self._base is None or batch > self._size[0] or capacity > self._size[1]:
            self._forget_graphs()
            self._base = None  # before the new one is made
            self._size = (max(batch, self._size[0]), max(-(-capacity // BUCKET) * BUCKET, self._size[1]))
            self._base = allocate(rows, *self._size)
        for name in PER_ROW:
            getattr(self._base, name).fill_(1)  # the previous call's last rows are idle now, as rows of one token
        return StaticRows.of(self._base, 0, longest=1).extend(rows)

    def __call__(self, rows: Rows, uniforms_BSC: Tensor, gamma: int) -> Verdict:
        """Play a round, as `Interleaving.round`; what it returns lasts until the next round."""
        assert isinstance(rows, StaticRows)  # noqa: S101 - `adopt` made them
        if not self._works:
            return self._play(rows, uniforms_BSC, gamma)
        batch, longest = rows.shape(block=uniforms_BSC.shape[1], capacity=self._size[1])
        key = (batch, gamma, longest)
        if key not in self._graphs:
            padded = rows.padded(batch, longest)
            static_BSC = uniforms_BSC.new_zeros(batch, *uniforms_BSC.shape[1:])
            self._capture = self._capture or self._capturing()
            try:
                replay, verdict = self._capture(lambda: self._with_casts_of_its_own(padded, static_BSC, gamma))
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                log.warning("rounds run without CUDA graphs, which is slower: %s", error)
                self._works = False
                return self._play(rows, uniforms_BSC, gamma)
            self._graphs[key] = (replay, static_BSC, verdict)
        replay, static_BSC, verdict = self._graphs[key]
        count = len(rows.index_B)
        static_BSC[:count] = uniforms_BSC
        replay()
        parts: dict[str, Any] = {}
        for field in fields(Verdict):
            part = getattr(verdict, field.name)
            parts[field.name] = None if part is None else part[:count]
        return Verdict(**parts)

    def _with_casts_of_its_own(self, rows: Rows, uniforms_BSC: Tensor, gamma: int) -> Verdict:
        """Play a round that casts the weights itself, once, under the autocast that is on.

        A graph must neither read a cast from before, which an optimiser step does not change, nor leave one behind.
        """
        torch.clear_autocast_cache()
        try:
            return self._play(rows, uniforms_BSC, gamma)
        finally:
            torch.clear_autocast_cache()


def _first(rows: Rows, count: int) -> dict[str, Any]:
    """Return the parts of the first rows, in the same memory."""
    parts: dict[str, Any] = {name: getattr(rows, name)[:count] for name in PER_ROW}
    for name in CACHES:
        cache = getattr(rows, name)
        parts[name] = None if cache is None else cache.first(count)
    return parts


def _placement(models: list[PreTrainedModel]) -> int:
    """Hash the weights' addresses and the state of PEFT's adapters (merged, switched off, exchanged)."""
    wrapped = [module for model in models for module in model.modules() if hasattr(module, "disable_adapters")]
    adapters = [(str(getattr(m, "merged_adapters", ())), m.disable_adapters, str(m.active_adapters)) for m in wrapped]
    return hash((*adapters, *(weight.data_ptr() for model in models for weight in model.parameters())))
