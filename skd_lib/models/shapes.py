"""Real models' shapes by name: those of their `config.json`, without weights."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from transformers import LlamaConfig, PreTrainedConfig, Qwen2Config
from transformers.models.gemma import GemmaConfig


def _qwen2(hidden: int, mlp: int, layers: int, heads: int, kv: int, vocabulary: int, tied: bool) -> PreTrainedConfig:
    return Qwen2Config(
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        vocab_size=vocabulary,
        tie_word_embeddings=tied,
    )


def _llama3(hidden: int, mlp: int, layers: int, heads: int, tied: bool) -> PreTrainedConfig:
    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        head_dim=hidden // heads,
        vocab_size=128256,
        tie_word_embeddings=tied,
    )


_SMOLLM2: dict[str, Any] = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
_GEMMA_2B = {
    "hidden_size": 2048,
    "intermediate_size": 16384,
    "num_hidden_layers": 18,
    "num_attention_heads": 8,
    "num_key_value_heads": 1,
}
SHAPES: dict[str, Callable[[], PreTrainedConfig]] = {
    "smollm2-135m": partial(LlamaConfig, **_SMOLLM2),
    "gemma-2b": partial(GemmaConfig, **_GEMMA_2B),
    "gemma-7b": GemmaConfig,
    "qwen2.5-0.5b": partial(_qwen2, 896, 4864, 24, 14, 2, 151936, tied=True),
    "qwen2.5-1.5b": partial(_qwen2, 1536, 8960, 28, 12, 2, 151936, tied=True),
    "qwen2.5-3b": partial(_qwen2, 2048, 11008, 36, 16, 2, 151936, tied=True),
    "qwen2.5-7b": partial(_qwen2, 3584, 18944, 28, 28, 4, 152064, tied=False),
    "qwen2.5-14b": partial(_qwen2, 5120, 13824, 48, 40, 8, 152064, tied=False),
    "qwen2.5-32b": partial(_qwen2, 5120, 27648, 64, 40, 8, 152064, tied=False),
    "llama-3.2-1b": partial(_llama3, 2048, 8192, 16, 32, tied=True),
    "llama-3.1-8b": partial(_llama3, 4096, 14336, 32, 32, tied=False),
    "llama-3.1-70b": partial(_llama3, 8192, 28672, 80, 64, tied=False),
}
"""By lower-case name."""
