"""Rows of data as people have them, turned into prompts and responses of tokens.

==========================  =======================================================================================
row has                     prompt and response
==========================  =======================================================================================
`messages`                  all before the last assistant message, and that message
`prompt`, `completion`      as they are: both strings, or both lists of messages
`prompt`                    the prompt; no response, so only methods that sample every response can train on it
==========================  =======================================================================================

These are the formats of TRL and of OpenAI's chat logs. Messages are rendered by the tokenizer's chat template.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from skd_lib.data.tokenize import TokenizedExample
from skd_lib.errors import SkdError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_KNOWN = "`messages`, `prompt` and `completion`, or `prompt`"


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

    Raises:
        SkdError: the row has none of the formats, or its prompt alone is too long.
    """
    messages = row.get("messages")
    if messages is not None:
        if isinstance(messages, str) or not hasattr(messages, "__iter__"):
            what = f"`messages` is a {type(messages).__name__}, not a list"
            raise SkdError(what, where=where, hint="read JSON texts as JSON first")
        messages = list(messages)
        prompt, response = _of_messages(tokenizer, messages, where)
    elif isinstance(row.get("prompt"), str):
        prompt = list(tokenizer(row["prompt"])["input_ids"])
        if len(prompt) > 1 and prompt[-1] == tokenizer.eos_token_id:  # tokenizers of encoders add it to every text
            prompt.pop()
        completion = row.get("completion")
        if completion is not None and not isinstance(completion, str):
            raise SkdError("`prompt` is a string and `completion` is none", where=where, hint="give both as strings")
        response = [] if completion is None else [*_plain(tokenizer, completion), eos_ids[0]]
    elif isinstance(row.get("prompt"), Sequence):
        if isinstance(row.get("completion"), str):
            what = "`prompt` is a list of messages and `completion` a string"
            raise SkdError(what, where=where, hint="give both as lists of messages, or both as strings")
        prompt, response = _of_messages(tokenizer, [*row["prompt"], *(row.get("completion") or ())], where)
    else:
        raise SkdError(
            f"the row has the fields {', '.join(sorted(row)) or 'none'}", where=where, hint=f"it needs {_KNOWN}"
        )
    ends = [index for index, token in enumerate(response) if token in eos_ids]
    if ends:
        response = response[: ends[0] + 1]
    elif response:
        response = [*response, eos_ids[0]]  # a chat template that does not end answers
    if max_length is not None:
        if len(prompt) >= max_length:
            raise SkdError(
                f"the prompt has {len(prompt)} tokens, and prompt and response together may have {max_length}",
                where=where,
                hint="raise max_length, or leave such rows out",
            )
        response = response[: max_length - len(prompt)]
    return TokenizedExample(prompt, response)


def _of_messages(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, Any]], where: str
) -> tuple[list[int], list[int]]:
    if not tokenizer.chat_template:
        raise SkdError(
            "the row holds messages and the tokenizer has no chat template",
            where=where or str(tokenizer.name_or_path),
            hint="use an instruction-tuned model, or rows with `prompt` and `completion` as strings",
        )
    for number, message in enumerate(messages):
        if (
            not isinstance(message, Mapping)
            or not isinstance(message.get("role"), str)
            or message.get("content") is None
        ):
            raise SkdError(
                f"message {number} is no `{{role, content}}`: {str(message)[:80]}",
                where=where,
                hint=f"rows need {_KNOWN}",
            )
    roles = [message["role"] for message in messages]
    last = len(roles) - 1 - roles[::-1].index("assistant") if "assistant" in roles else len(roles)
    if last == 0 or not messages:
        raise SkdError("there is no message before the assistant's", where=where)

    def rendered(part: Sequence[Mapping[str, Any]], *, prompt: bool) -> str:
        return str(tokenizer.apply_chat_template(list(part), tokenize=False, add_generation_prompt=prompt))

    before = rendered(messages[:last], prompt=True)
    response = ""
    if last < len(messages):
        whole = rendered(messages[: last + 1], prompt=False)
        if not whole.startswith(before):
            # Some templates open an answer otherwise than their generation prompt does (an empty thinking part, ...).
            before = rendered(messages[:last], prompt=False)
        if not whole.startswith(before):
            raise SkdError(
                "the chat template writes the conversation otherwise when the answer follows",
                where=where or str(tokenizer.name_or_path),
                hint="give rows with `prompt` and `completion` as strings",
            )
        response = whole[len(before) :]
    return list(tokenizer(before, add_special_tokens=False)["input_ids"]), list(
        tokenizer(response, add_special_tokens=False)["input_ids"]
    )


def _plain(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])
