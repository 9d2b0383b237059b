"""Models whose tokenizers have tokens of their own."""

from __future__ import annotations

from pathlib import Path

from tokenizers import AddedToken

from skd_lib.models.files import load_tokenizer


def with_tokens(folder: Path, *tokens: str, pad: str | None = None) -> Path:
    """Add special tokens, and one for padding, to the tokenizer in a model's folder; return the folder."""
    tokenizer = load_tokenizer(folder)
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in tokens])
    if pad is not None:
        tokenizer.add_special_tokens({"pad_token": pad})
    tokenizer.save_pretrained(folder)
    return folder
