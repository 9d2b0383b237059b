"""Text that a chat template writes: its letters, its tokens, and the tokens that end an answer."""

from __future__ import annotations

import html
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def letters(text: str) -> str:
    """Return letters and digits, without case: the part of a text that survives escaping and other spellings."""
    return re.sub(r"\W+", "", html.unescape(text.replace("\\n", "\n"))).casefold()


def ending(tokenizer: PreTrainedTokenizerBase, after: str) -> tuple[str, tuple[int, ...]]:
    """Split the text after an answer into text that belongs to the answer, and the special tokens that end it.

    Several tokens that follow each other end it together if the last is the tokenizer's EOS or the text's end (Cohere
    closes answer and turn); else the first does, and another message follows.
    """
    added = {token.content: int(token_id) for token_id, token in tokenizer.added_tokens_decoder.items()}
    special = {str(token): tokenizer.convert_tokens_to_ids(token) for token in tokenizer.all_special_tokens}
    added |= {token: int(token_id) for token, token_id in special.items() if token_id is not None}  # named, but unknown
    names = sorted((name for name in added if name.strip()), key=len, reverse=True)
    pattern = re.compile("|".join(map(re.escape, names)) or r"(?!)")
    first = pattern.search(after)
    if first is None:
        return after.rstrip(), ()
    run = [first]
    while following := pattern.match(after, run[-1].end()):
        run.append(following)
    ids = [added[match[0]] for match in run]
    if tokenizer.eos_token_id in ids:
        closing = ids[: ids.index(tokenizer.eos_token_id) + 1]
    else:
        closing = ids if not after[run[-1].end() :].strip() else ids[:1]
    return after[: first.start()], tuple(closing)


def tokens_behind(tokenizer: PreTrainedTokenizerBase, anchor: str, text: str) -> list[int]:
    """Return the token ids of a text after `anchor`; of the text alone where a token spans both."""
    head = plain_ids(tokenizer, anchor) if anchor else []
    whole = plain_ids(tokenizer, anchor + text)
    return whole[len(head) :] if whole[: len(head)] == head else plain_ids(tokenizer, text)


def plain_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the token ids of a text in which special tokens stay text."""
    return list(tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])
