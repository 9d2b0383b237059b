"""Rows as trainers get them, turned into prompts and responses of tokens.

==================================  ================================================================================
row has                             prompt and response
==================================  ================================================================================
`messages`, or `conversations`      all before the last answer, and that answer; `each_turn` makes a row of each answer
`prompt`, `completion`              as they are: both strings, or both lists of messages
`prompt`                            the prompt; no response, so only methods that sample every response can train on it
==================================  ================================================================================

Messages are read by `skd_lib.data.conversations` and rendered by the tokenizer's chat template, as in the pipeline.
Strings are taken as they are, without a chat template.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from skd_lib.config import TaskConfig
from skd_lib.data.chat import chat_layout
from skd_lib.data.conversations import Conversation, as_text, read_conversation, read_prompt
from skd_lib.data.examples import conversation_example
from skd_lib.data.rows import CONVERSATIONS
from skd_lib.data.template_text import plain_ids
from skd_lib.data.tokenize import TokenizedExample, answer_end_id, encode, encode_prompt
from skd_lib.errors import SkdError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)
_KNOWN = "`messages`, `prompt` and `completion`, or `prompt`"
_AS_STRINGS = "use an instruction-tuned model, or rows with `prompt` and `completion` as strings"
_TASK = TaskConfig(max_new_tokens=2**20)
"""Messages as they are, of any length."""
_TEXT = TaskConfig(chat_template=False)
"""Prompts as they are."""


def tokenize_row(
    tokenizer: PreTrainedTokenizerBase,
    row: Mapping[str, Any],
    eos_ids: Sequence[int],
    *,
    max_length: int | None = None,
    where: str = "",
) -> TokenizedExample:
    """Tokenise one row of any of the formats above.

    Args:
        tokenizer: The models' tokenizer; has a chat template where rows hold messages.
        row: The row.
        eos_ids: Ids that end a response; the response ends at the first of them. A completion without a chat template
            gets the first of them at its end.
        max_length: Most tokens of prompt and response together; the response is cut, and then has no end token.
        where: What the errors call the row.

    Returns:
        Prompt and response; the response is empty where the row has none.
    """
    talk = _conversation(row, where)
    if talk is not None:
        prompt, response = _of_messages(tokenizer, talk, eos_ids, where)
    elif isinstance(row.get("prompt"), str):
        prompt = encode_prompt(tokenizer, _TEXT, row["prompt"])
        completion = row.get("completion")
        if completion is not None and not isinstance(completion, str):
            raise SkdError("`prompt` is a string and `completion` is none", where=where, hint="give both as strings")
        response = [] if completion is None else [*plain_ids(tokenizer, completion), eos_ids[0]]
    else:
        raise SkdError(
            f"the row has the fields {', '.join(sorted(row)) or 'none'}", where=where, hint=f"it needs {_KNOWN}"
        )
    ends = [index for index, token in enumerate(response) if token in eos_ids]
    if ends:
        response = response[: ends[0] + 1]
    elif response:
        response = [*response, eos_ids[0]]  # a chat template that ends answers with a token of its own, or with none
    if max_length is not None:
        if len(prompt) >= max_length:
            raise SkdError(
                f"the prompt has {len(prompt)} tokens, and prompt and response together may have {max_length}",
                where=where,
                hint="raise max_length, or leave such rows out",
            )
        response = response[: max_length - len(prompt)]
    return TokenizedExample(prompt, response)


def with_answer_end(tokenizer: PreTrainedTokenizerBase, eos_ids: Sequence[int]) -> tuple[int, ...]:
    """Return ids that end a response, and the one that the chat template puts after answers, if there is a template."""
    if not tokenizer.chat_template:
        return tuple(eos_ids)
    try:
        return tuple(dict.fromkeys([*eos_ids, answer_end_id(tokenizer, _TASK)]))
    except SkdError:  # rows of texts do without the template, and `tokenize_row` refuses those of messages
        return tuple(eos_ids)


def each_turn(rows: Iterable[Mapping[str, Any]], where: str = "") -> Iterator[Mapping[str, Any]]:
    """Yield a row for each answer of a conversation that counts in training; other rows as they are."""
    for number, row in enumerate(rows, start=1):
        talk = _conversation(row, f"{where}, row {number}")
        if talk is None or talk.answer is None:
            yield row
        else:
            yield from (turn.to_dict() for turn in talk.turns())


def _conversation(row: Mapping[str, Any], where: str) -> Conversation | None:
    """Return the messages of a row; None where it holds texts."""
    tools = row.get("tools")
    try:
        for name in CONVERSATIONS:
            if row.get(name) is not None:
                return read_conversation(row[name], tools, field=name)
        if isinstance(row.get("prompt"), Sequence) and not isinstance(row["prompt"], str):
            return read_prompt(row["prompt"], row.get("completion"), tools, fields=("prompt", "completion"))
    except SkdError as error:
        place = ", ".join(filter(None, (where, error.where)))
        raise SkdError(error.what, where=place, hint=error.hint) from error
    return None


def _of_messages(
    tokenizer: PreTrainedTokenizerBase, talk: Conversation, eos_ids: Sequence[int], where: str
) -> tuple[list[int], list[int]]:
    name = where or str(tokenizer.name_or_path)
    if not tokenizer.chat_template:
        what = "the row holds messages and the tokenizer has no chat template"
        raise SkdError(what, where=name, hint=_AS_STRINGS)
    try:
        encoded = encode(tokenizer, _TASK, conversation_example(talk), answer_end_id(tokenizer, _TASK), eos_ids)
    except SkdError as error:
        raise SkdError(error.what, where=name, hint="correct the chat template or this row") from error
    for remark in _remarks(tokenizer, talk):
        _warn_once(str(tokenizer.name_or_path), remark)
    return encoded.prompt_ids, encoded.response_ids


def _remarks(tokenizer: PreTrainedTokenizerBase, talk: Conversation) -> Iterator[str]:
    """Say what of a conversation the chat template writes in another way than it is given."""
    layout = chat_layout(tokenizer, _TASK)
    yield from layout.notes
    answer = "" if talk.answer is None else as_text(talk.answer)
    if what := layout.departure(_TASK, talk, answer):
        does = "does not write" if what in ("tools", "thinking") else "changes or leaves out"
        thinking = "; thinking belongs into the field `reasoning_content` of its message" if what == "answer" else ""
        yield f"the chat template {does} the {what} of some rows{thinking}"


@lru_cache(maxsize=256)
def _warn_once(name: str, remark: str) -> None:
    log.warning("%s: %s", name, remark)
