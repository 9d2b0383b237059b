"""A key/value cache in which every row has its own length.

Rows of a batch accept different numbers of tokens, so one length for all would mean copying or padding. Here a
forward pass writes each row's keys and values at that row's own positions. Accepting tokens is advancing a row's
length, rejecting them is not advancing it: what lies beyond a row's length is never seen, because every query is
masked to keys at or before its own position, and a position is rewritten before it is next reached.

That needs keys and values of single positions, at places that the caller names: decoders with rotary positions and
attention layers, full or with a sliding window, bare or wrapped by PEFT. `check_supported` refuses every other
architecture by its name: decoding it needs a path without this cache, which there is not yet.

Memory: 2 x layers x kv_heads x head_dim x batch x capacity elements of the model's compute dtype.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from skd_lib.errors import SkdError
from skd_lib.models.heads import decoder


@dataclass
class _Block:
    """Where a forward pass writes, and how many keys it sees.

    The layers share it instead of pointing back to their cache: a cycle would keep the memory until the garbage
    collector comes round.
    """

    positions_BT: Tensor
    visible: int


class RowCache(Cache):
    """Keys and values of up to `capacity` positions a row.

    Args:
        config: The model's configuration.
        capacity: Positions allocated for every row.
    """

    def __init__(self, config: PreTrainedConfig, capacity: int) -> None:
        self.block = _Block(torch.empty(0, 0, dtype=torch.long), 0)
        super().__init__(layers=[_RowLayer(self.block, capacity) for _ in range(config.num_hidden_layers)])

    def select(self, rows: Tensor) -> None:
        """Keep only the given rows (indices, in the given order)."""
        for layer in self.layers:
            layer.replace(layer.keys.index_select(0, rows), layer.values.index_select(0, rows))

    def extend(self, other: RowCache) -> None:
        """Append the rows of another cache of the same capacity."""
        for layer, more in zip(self.layers, other.layers, strict=True):
            layer.replace(torch.cat([layer.keys, more.keys]), torch.cat([layer.values, more.values]))


class _RowLayer(CacheLayerMixin):
    """One layer's keys and values: (B, kv_heads, capacity, head_dim)."""

    is_sliding = False  # sliding windows are a matter of the mask: every position is kept

    def __init__(self, block: _Block, capacity: int) -> None:
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
        positions_BT = self.block.positions_BT
        rows_B1 = torch.arange(len(positions_BT), device=positions_BT.device).unsqueeze(1)
        self.keys[rows_B1, :, positions_BT] = key_states.transpose(1, 2)
        self.values[rows_B1, :, positions_BT] = value_states.transpose(1, 2)
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


def check_supported(model: PreTrainedModel) -> None:
    """See that `forward` computes what the model itself would.

    Raises:
        SkdError: the architecture keeps more, or other things, than the keys and values of positions. It is named.
    """
    config = model.config.get_text_config(decoder=True)
    layers = set(getattr(config, "layer_types", None) or ())
    hint = "use a decoder with rotary positions and attention layers, e.g. Llama, Mistral, Qwen or Gemma"
    if model.config.is_encoder_decoder:
        reason = "is an encoder-decoder"
    elif getattr(model, "_is_stateful", False) or not layers <= {"full_attention", "sliding_attention"}:
        reason = "has layers other than full and sliding-window attention, whose state cannot take tokens back"
    elif getattr(config, "num_kv_shared_layers", 0):
        reason = "shares keys and values between layers"
    elif getattr(config, "alibi", False) or not any(
        name.rpartition(".")[2] == "rotary_emb" for name, _ in decoder(model).named_modules()
    ):
        reason = "has no rotary positions"
    elif getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        reason, hint = "is wrapped by PEFT with virtual tokens", "use an adapter that changes weights, e.g. LoRA"
    elif config._attn_implementation not in {"sdpa", "eager"}:
        reason = f"uses attention `{config._attn_implementation}`, which cannot read a mask of ragged rows"
        hint = 'load it with attn_implementation="sdpa"'
    else:
        return
    raise SkdError(f"cannot sample from this `{config.model_type}` model: it {reason}", hint=hint)


def forward(model: PreTrainedModel, cache: RowCache, tokens_BT: Tensor, starts_B: Tensor, longest: int) -> Tensor:
    """Run the decoder on a block of tokens that starts at each row's own position.

    Args:
        model: A causal language model that `check_supported` lets pass.
        cache: Holds the positions before `starts_B`; those of the block are written.
        tokens_BT: Token ids.
        starts_B: Position of each row's first token.
        longest: An upper bound of `starts_B.max()`; keys beyond `longest + T` are not read.

    Returns:
        (B, T, H) hidden states after the final norm.
    """
    width = tokens_BT.shape[1]
    positions_BT = starts_B.unsqueeze(1) + torch.arange(width, device=starts_B.device)
    cache.block.positions_BT, cache.block.visible = positions_BT, longest + width
    output = decoder(model)(
        input_ids=tokens_BT,
        attention_mask=attention_mask(model, positions_BT, cache.block.visible),
        position_ids=positions_BT,
        past_key_values=cache,
        use_cache=True,
    )
    hidden: Tensor = output.last_hidden_state
    return hidden


def attention_mask(model: PreTrainedModel, positions_BT: Tensor, visible: int) -> Tensor | dict[str, Tensor]:
    """(B, 1, T, visible): each query sees the keys at or before its position, within the layer's window.

    A dict by layer type where the architecture mixes them; additive for eager attention, boolean for sdpa (eager
    adds the mask to the scores: a boolean one would be silently wrong).
    """
    config = model.config.get_text_config(decoder=True)
    keys = torch.arange(visible, device=positions_BT.device)
    queries = positions_BT[:, None, :, None]
    causal = keys <= queries

    def finish(mask: Tensor) -> Tensor:
        if config._attn_implementation != "eager":
            return mask
        return torch.zeros_like(mask, dtype=model.dtype).masked_fill_(~mask, torch.finfo(model.dtype).min)

    window = getattr(config, "sliding_window", None)
    sliding = causal if window is None else causal & (keys > queries - window)
    layer_types = getattr(config, "layer_types", None)
    if layer_types is not None:
        return {kind: finish(sliding if kind == "sliding_attention" else causal) for kind in set(layer_types)}
    return finish(sliding)
