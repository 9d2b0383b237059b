"""Caches of a decoding model, in which every row has its own length.

Rows of a batch accept different numbers of tokens, so one length for all would mean copying or padding. Here a
forward pass writes at each row's own positions. Accepting tokens is advancing a row's length, rejecting them is not
advancing it: what lies beyond a row's length is never seen, because every query is masked to positions at or before
its own, and a position is rewritten before it is next reached.

`RowCache` keeps keys and values. That needs them to be of single positions, at places that the caller names: decoders
with rotary positions and attention layers, full or with a sliding window, bare or wrapped by PEFT. Its memory:
2 x layers x kv_heads x head_dim x batch x capacity elements of the model's compute dtype.

Any other decoder (absolute positions, recurrent or linear-attention layers, attention that takes no mask) gets a
`TokenCache`, which keeps the tokens and runs the model on all of them again: correct, and slower by the length of the
sequence. `skd_lib.models.heads.check_supported` refuses models that are no causal decoders.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from functools import cache as once
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from skd_lib.models.files import context_length
from skd_lib.models.heads import decoder

log = logging.getLogger(__name__)


@dataclass
class Window:
    """The positions that a forward pass writes, and the number of keys that it sees.

    The layers share it instead of pointing back to their cache: a cycle would keep the memory until the garbage
    collector comes round.
    """

    rows_B1: Tensor = field(default_factory=lambda: torch.empty(0, 0, dtype=torch.long))
    positions_BT: Tensor = field(default_factory=lambda: torch.empty(0, 0, dtype=torch.long))
    visible: int = 0


class RowCache(Cache):
    """Keys and values of up to `capacity` positions a row, all allocated."""

    def __init__(self, config: PreTrainedConfig, capacity: int) -> None:
        self.block, self.config = Window(), config
        super().__init__(layers=[RowLayer(self.block, capacity) for _ in range(config.num_hidden_layers)])

    def forward(self, model: PreTrainedModel, tokens_BT: Tensor, positions_BT: Tensor, visible: int) -> Tensor:
        """Return (B, T, H) final states of a block of tokens, and write its keys and values."""
        self.block.rows_B1 = torch.arange(len(positions_BT), device=positions_BT.device).unsqueeze(1)
        self.block.positions_BT, self.block.visible = positions_BT, visible
        hidden: Tensor = decoder(model)(
            input_ids=tokens_BT,
            attention_mask=attention_mask(model, positions_BT, visible),
            position_ids=positions_BT,
            past_key_values=self,
            use_cache=True,
        ).last_hidden_state
        return hidden

    def select(self, rows: Tensor) -> None:
        """Keep only the given rows (indices, in the given order)."""
        for layer in self.layers:
            layer.replace(layer.keys.index_select(0, rows), layer.values.index_select(0, rows))

    def extend(self, other: RowCache) -> None:
        """Append the rows of another cache of the same capacity."""
        for layer, more in zip(self.layers, other.layers, strict=True):
            layer.replace(torch.cat([layer.keys, more.keys]), torch.cat([layer.values, more.values]))

    def empty(self, batch: int, capacity: int) -> RowCache:
        """Make a cache of the same kind and another size."""
        new = RowCache(self.config, capacity)
        for layer, like in zip(new.layers, self.layers, strict=True):
            layer.replace(*(x.new_zeros(batch, x.shape[1], capacity, x.shape[3]) for x in (like.keys, like.values)))
        return new

    def write(self, start: int, other: RowCache) -> None:
        """Copy another cache's rows, which may have less capacity, over those from `start` on."""
        for layer, new in zip(self.layers, other.layers, strict=True):
            rows, width = slice(start, start + len(new.keys)), new.keys.shape[2]
            layer.keys[rows, :, :width] = new.keys
            layer.values[rows, :, :width] = new.values

    def first(self, batch: int) -> RowCache:
        """Return the first rows, in the same memory."""
        view = RowCache(self.config, self.layers[0].capacity)
        for layer, mine in zip(view.layers, self.layers, strict=True):
            layer.replace(mine.keys[:batch], mine.values[:batch])
        return view


class RowLayer(CacheLayerMixin):
    """One layer's keys and values: (B, kv_heads, capacity, head_dim)."""

    is_sliding = False  # sliding windows are a matter of the mask: every position is kept

    def __init__(self, block: Window, capacity: int) -> None:
        super().__init__()
        self.block, self.capacity = block, capacity

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate, in the shape and dtype of the first states that arrive."""
        self.replace(*(x.new_zeros(*x.shape[:2], self.capacity, x.shape[3]) for x in (key_states, value_states)))

    def replace(self, keys: Tensor, values: Tensor) -> None:
        """Take these tensors as the layer's keys and values."""
        self.keys, self.values, self.is_initialized = keys, values, True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Write (B, kv_heads, T, head_dim) states at each row's positions; return all that may be seen."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        block = self.block
        self.keys[block.rows_B1, :, block.positions_BT] = key_states.transpose(1, 2)
        self.values[block.rows_B1, :, block.positions_BT] = value_states.transpose(1, 2)
        return self.keys[:, :, : self.block.visible], self.values[:, :, : self.block.visible]

    def get_seq_length(self) -> int:
        """Rows have no common length: callers pass position ids and masks."""
        return 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:  # noqa: ARG002 - the base class's signature
        """Keys that a query may see, and where they start."""
        return self.block.visible, 0

    def get_max_length(self) -> int:
        """Positions allocated for every row."""
        return self.capacity


class TokenCache:
    """The tokens of every row, for decoders whose state cannot take tokens back.

    Rows are padded on the right, where a causal decoder does not look, so that no mask is needed.
    """

    def __init__(self, tokens_BC: Tensor) -> None:
        self.tokens_BC = tokens_BC

    def forward(self, model: PreTrainedModel, tokens_BT: Tensor, positions_BT: Tensor, visible: int) -> Tensor:
        """Return (B, T, H) final states of a block of tokens, from a forward over all tokens up to its end."""
        # The filler before a prompt of one token, at position -1, goes to the last column, where nothing is read.
        rows_B1 = torch.arange(len(tokens_BT), device=tokens_BT.device).unsqueeze(1)
        self.tokens_BC[rows_B1, positions_BT] = tokens_BT
        # No further than some row's block. One may run over the length limit, which may be where the model's positions
        # end: nothing there is kept.
        visible = min(int(positions_BT.max()) + 1, context_length(model.config) or visible)
        hidden_BLH: Tensor = decoder(model)(input_ids=self.tokens_BC[:, :visible], use_cache=False).last_hidden_state
        return hidden_BLH[rows_B1, positions_BT.clamp(max=visible - 1)]

    def select(self, rows: Tensor) -> None:
        """Keep only the given rows (indices, in the given order)."""
        self.tokens_BC = self.tokens_BC.index_select(0, rows)

    def extend(self, other: TokenCache) -> None:
        """Append the rows of another cache of the same capacity."""
        self.tokens_BC = torch.cat([self.tokens_BC, other.tokens_BC])


def prefilled(model: PreTrainedModel, tokens_BP: Tensor, capacity: int) -> RowCache | TokenCache:
    """Make a cache that holds these tokens, from position 0 on, with room for `capacity` positions."""
    if reason := _no_row_cache(model):
        _warn_once(model.config.model_type, reason)
        return TokenCache(F.pad(tokens_BP, (0, capacity - tokens_BP.shape[1])))
    cache = RowCache(model.config.get_text_config(decoder=True), capacity)
    forward(model, cache, tokens_BP, tokens_BP.new_zeros(len(tokens_BP)), 0)
    return cache


def prefill_positions(model: PreTrainedModel, prompt: int) -> int:
    """Count the positions of a prompt of `prompt` tokens that go through the decoder before the first round.

    All but the last, which the first round feeds; at least one, so that the cache's layers are allocated.
    """
    return max(prompt - 1, 1) if keeps_rows(model) else 0


def forward(
    model: PreTrainedModel, cache: RowCache | TokenCache, tokens_BT: Tensor, starts_B: Tensor, longest: int
) -> Tensor:
    """Run the decoder on a block of tokens that starts at each row's own position.

    Args:
        model: A causal language model that `check_supported` accepts.
        cache: Holds the positions before `starts_B`; those of the block are written.
        tokens_BT: Token ids.
        starts_B: Position of each row's first token.
        longest: An upper bound of `starts_B.max()`; positions beyond `longest + T` are not read.

    Returns:
        (B, T, H) hidden states after the final norm.
    """
    width = tokens_BT.shape[1]
    positions_BT = starts_B.unsqueeze(1) + torch.arange(width, device=starts_B.device)
    return cache.forward(model, tokens_BT, positions_BT, longest + width)


def positions_read(model: PreTrainedModel, cache: RowCache | TokenCache, starts_B: Tensor, width: int) -> int | Tensor:
    """Count the positions of each row that `forward` over `width` tokens computes: one number, or (B,)."""
    if isinstance(cache, RowCache):
        return width
    ends_B, limit = starts_B + width, context_length(model.config)
    return ends_B if limit is None else ends_B.clamp(max=limit)


def position_limit(model: PreTrainedModel, block: int) -> int | None:
    """Return the most tokens that a row may have; None where the model has no limit.

    Some rotary positions (`dynamic`, `longrope`) change for all rows as soon as one row is longer than the model was
    first trained for; such a row is too long. A round may look at `block` positions beyond a row's last token.
    """
    limit = context_length(model.config)
    stretches_from = _stretches_from(model)
    return limit if stretches_from is None else min(limit or stretches_from, stretches_from - block)


def _stretches_from(model: PreTrainedModel) -> int | None:
    """Return the length of a row from which on the rotary positions of all rows change; None if they never do."""
    config = model.config.get_text_config(decoder=True)
    given = getattr(config, "rope_parameters", None) or {}
    kinds = [given] if "rope_type" in given else [each for each in given.values() if isinstance(each, dict)]
    changing = [each for each in kinds if each.get("rope_type") in ("dynamic", "longrope")]
    starts = [each.get("original_max_position_embeddings") or context_length(model.config) for each in changing]
    return min((start for start in starts if start), default=None)


def keeps_rows(model: PreTrainedModel) -> bool:
    """Return True if the model decodes with a `RowCache`."""
    return _no_row_cache(model) is None


def stretches(model: PreTrainedModel) -> bool:
    """Return True if rotary positions depend on the longest row; some such models ask the device for its length."""
    return _stretches_from(model) is not None


def _no_row_cache(model: PreTrainedModel) -> str | None:
    """Return the reason why the model needs more than keys and values at given positions; None if it does not."""
    config = model.config.get_text_config(decoder=True)
    layers = set(getattr(config, "layer_types", None) or ())
    if getattr(model, "_is_stateful", False) or not layers <= {"full_attention", "sliding_attention"}:
        return "has layers other than full and sliding-window attention"
    if getattr(config, "num_kv_shared_layers", 0):
        return "shares keys and values between layers"
    if getattr(config, "alibi", False) or not any(
        name.rpartition(".")[2] == "rotary_emb" for name, _ in decoder(model).named_modules()
    ):
        return "has no rotary positions"
    if config._attn_implementation not in {"sdpa", "eager"}:
        return f'uses attention `{config._attn_implementation}` (attn_implementation="sdpa" is faster here)'
    return None


@once
def _warn_once(model_type: str, reason: str) -> None:
    log.warning("no cache for `%s`, which %s: each forward reads the whole sequence again", model_type, reason)


def attention_mask(model: PreTrainedModel, positions_BT: Tensor, visible: int) -> Tensor | dict[str, Tensor]:
    """Make the (B, 1, T, visible) mask: a query sees the keys at or before its position, within the layer's window.

    A dict by layer type where the architecture mixes them; additive for eager attention (it adds the mask to the
    scores: a boolean one would be silently wrong) and on a GPU (sdpa would make it so itself, in every layer; but it
    wants the queries' dtype, which is not the weights' where these are quantised), else boolean.
    """
    config = model.config.get_text_config(decoder=True)
    keys = torch.arange(visible, device=positions_BT.device)
    queries = positions_BT[:, None, :, None]
    # The filler before a row of one token, at position -1, sees that token: a query that sees nothing is NaN on a GPU,
    # and what it leaves in the cache would spread, masked or not.
    causal = keys <= queries.clamp_min(0)

    def finish(mask: Tensor) -> Tensor:
        on_gpu = positions_BT.device.type == "cuda" and not getattr(model, "is_quantized", False)
        if config._attn_implementation != "eager" and not on_gpu:
            return mask
        return torch.zeros_like(mask, dtype=model.dtype).masked_fill_(~mask, torch.finfo(model.dtype).min)

    window = getattr(config, "sliding_window", None)
    sliding = causal if window is None else causal & (keys > queries - window)
    layer_types = getattr(config, "layer_types", None)
    if layer_types is not None:
        return {kind: finish(sliding if kind == "sliding_attention" else causal) for kind in set(layer_types)}
    return finish(sliding)
