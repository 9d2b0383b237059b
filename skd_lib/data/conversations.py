"""Conversations: lists of messages as OpenAI, TRL and ShareGPT write them, checked and brought into one form.

A message is `{role, content}`, or ShareGPT's `{from, value}`. Answers may have `tool_calls`; OpenAI's `weight: 0` keeps
an answer out of training. Messages and tools go to the chat template as they are, but for the changes named at `_read`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from skd_lib.data.rendering import Message
from skd_lib.errors import SkdError

ROLES = ("system", "user", "assistant", "tool")
_OTHER_NAMES = {
    "developer": "system",
    "human": "user",
    "gpt": "assistant",
    "function_call": "assistant",
    "function": "tool",
    "observation": "tool",
}
_TEXT = ("text", "input_text", "output_text")
_SHAPE = 'write {"role": "user", "content": "..."}'
_REMOVE = "correct or remove this row"


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages in their order, at least one, and the tools that the assistant may call.

    Attributes:
        messages: If the last one is the assistant's, it is the answer; else the conversation is a prompt alone.
        tools: Descriptions of tools, as a chat template takes them.
    """

    messages: tuple[Message, ...]
    tools: tuple[Any, ...] = ()

    @property
    def answer(self) -> Message | None:
        """Return the assistant's last message; None for a prompt alone."""
        last = self.messages[-1]
        return last if last["role"] == "assistant" else None

    @property
    def asked(self) -> tuple[Message, ...]:
        """Return the messages before the answer."""
        return self.messages if self.answer is None else self.messages[:-1]

    @property
    def is_plain(self) -> bool:
        """Return whether the answer is text alone, without calls of tools or other fields."""
        return self.answer is None or self.answer.keys() <= {"role", "content", "weight"}

    def turns(self) -> list[Conversation]:
        """Return a conversation for each answer that counts in training: all before it, and it; else this one."""
        ends = [number for number, message in enumerate(self.messages, start=1) if is_trained(message)]
        return [Conversation(self.messages[:end], self.tools) for end in ends] or [self]

    def question(self) -> str:
        """Return what the answer replies to as text: the only user's message, or the whole talk with its roles."""
        spoken = [message for message in self.asked if message["role"] != "system"]
        if len(spoken) == 1:
            return str(spoken[0]["content"])
        return "\n".join(f"{message['role']}: {as_text(message)}" for message in self.asked)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {"messages": list(self.messages), **({"tools": list(self.tools)} if self.tools else {})}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Conversation:
        """Return the conversation of `to_dict`."""
        return cls(tuple(values["messages"]), tuple(values.get("tools", ())))


def is_trained(message: Message) -> bool:
    """Return whether a message is an answer that counts in training."""
    return message["role"] == "assistant" and message.get("weight") != 0


def as_text(message: Message) -> str:
    """Return a message's text, with its calls of tools as lines of JSON."""
    calls = [json.dumps(call.get("function", call), ensure_ascii=False) for call in message.get("tool_calls", ())]
    return "\n".join(filter(None, [str(message["content"]), *calls]))


def read_conversation(value: Any, tools: Any = None, *, field: str = "messages") -> Conversation:
    """Read a list of messages that ends with an answer; without any answer it is a prompt alone.

    The conversation ends with the last answer that counts in training.

    Raises:
        SkdError: it cannot be used; `where` names the field and the message, counted from 1.
    """
    messages = _read_all(value, field)
    if not any(message["role"] == "assistant" for message in messages):
        return Conversation(messages, read_tools(tools))
    if messages[-1]["role"] != "assistant":
        raise SkdError(
            f"the last message is the {messages[-1]['role']}'s, and no answer follows",
            where=f"field `{field}`, message {len(messages)}",
            hint="end the conversation with the assistant's message, or give prompts alone in a column `prompt`",
        )
    ends = _trained(messages, field)
    _check_asked(messages[: ends[0] - 1], field)
    return Conversation(messages[: ends[-1]], read_tools(tools))


def read_prompt(prompt: Any, completion: Any, tools: Any = None, *, fields: tuple[str, str]) -> Conversation:
    """Read a list of messages, and the messages that complete it; None for a prompt alone.

    Answers inside the prompt do not count in training.

    Raises:
        SkdError: they cannot be used; `where` names the field and the message, counted from 1.
    """
    asked = _read_all(prompt, fields[0])
    if completion is None:
        if asked[-1]["role"] == "assistant":
            what = "the prompt ends with the assistant's message"
            hint = f"end it with the user's, or put the answer into the field `{fields[1]}`"
            raise SkdError(what, where=f"field `{fields[0]}`, message {len(asked)}", hint=hint)
        return Conversation(asked, read_tools(tools))
    if not _is_list(completion):
        what = f"the prompt is a list of messages, and this is {_kind(completion)}"
        raise SkdError(what, where=f"field `{fields[1]}`", hint="give both as lists of messages, or both as text")
    _check_asked(asked, fields[0])
    said = _read_all(completion, fields[1])
    if said[-1]["role"] != "assistant":
        what = f"the last message is the {said[-1]['role']}'s, not the assistant's"
        raise SkdError(what, where=f"field `{fields[1]}`, message {len(said)}", hint=_REMOVE)
    return Conversation((*_history(asked), *said[: _trained(said, fields[1])[-1]]), read_tools(tools))


def read_request(value: Any, tools: Any = None, *, field: str = "messages") -> Conversation:
    """Read a list of messages as a prompt alone: up to the last one that is not the assistant's.

    Raises:
        SkdError: it cannot be used; `where` names the field and the message, counted from 1.
    """
    messages = _read_all(value, field)
    ends = [number for number, message in enumerate(messages, start=1) if message["role"] in ("user", "tool")]
    if not ends:
        raise SkdError("there is no user's message", where=f"field `{field}`", hint=_REMOVE)
    return Conversation(_history(messages[: ends[-1]]), read_tools(tools))


def read_tools(value: Any) -> tuple[Any, ...]:
    """Read descriptions of tools: a list of objects, or such a list as a JSON text."""
    tools = _without_nulls(_parsed(value))
    if not tools:
        return ()
    if not _is_list(tools) or not all(isinstance(tool, Mapping) for tool in tools):
        what = f"must be a list of objects, got {_kind(value)}"
        raise SkdError(what, where="field `tools`", hint="write tools as OpenAI's: a list of {type, function}")
    return tuple(tools)


def _history(messages: Sequence[Message]) -> tuple[Message, ...]:
    """Return messages of which no answer counts in training."""
    return tuple(message | ({"weight": 0} if message["role"] == "assistant" else {}) for message in messages)


def _trained(messages: Sequence[Message], field: str) -> list[int]:
    """Return the places, from 1, of the answers that count in training, of which there must be one."""
    ends = [number for number, message in enumerate(messages, start=1) if is_trained(message)]
    if not ends:
        what = "every assistant message has `weight: 0`, so there is nothing to train on"
        raise SkdError(what, where=f"field `{field}`", hint="remove this row, or give one answer the weight 1")
    return ends


def _check_asked(before: Sequence[Message], field: str) -> None:
    if not before:
        what = "there is no message before the assistant's"
        raise SkdError(what, where=f"field `{field}`, message 1", hint="begin with the user's message")


def _read_all(value: Any, field: str) -> tuple[Message, ...]:
    messages = _parsed(value)
    if not _is_list(messages):
        raise SkdError(f"must be a list of messages, got {_kind(value)}", where=f"field `{field}`", hint=_SHAPE)
    if not len(messages):
        raise SkdError("there are no messages", where=f"field `{field}`", hint=_REMOVE)
    found = []
    for number, message in enumerate(messages, start=1):
        try:
            found.append(_read(message))
        except SkdError as error:
            where = f"field `{field}`, message {number}"
            raise SkdError(error.what, where=where, hint=error.hint) from error
    # A system message that says nothing is none.
    return tuple(m for m in found if m["role"] != "system" or m["content"].strip()) or tuple(found)


def _read(message: Any) -> Message:
    """Return a message with `role` and `content` as text.

    Other names of roles are replaced, parts of text joined, fields that are null left out (tables of Parquet have every
    field in every message), and arguments of calls parsed, which OpenAI writes as JSON texts and templates want whole.
    """
    if not isinstance(message, Mapping):
        raise SkdError(f"must be an object, got {_kind(message)}", hint=_SHAPE)
    if "role" not in message and "from" in message:
        message = {"role": message["from"], "content": message.get("value")}
    named = message.get("role")
    role = _OTHER_NAMES.get(named, named) if isinstance(named, str) else None
    if role not in ROLES:
        what = "there is no `role`" if named is None else f"unknown role {str(named)[:40]!r}"
        known = ", ".join((*ROLES, *_OTHER_NAMES))
        raise SkdError(what, hint=f"{_SHAPE}; roles are {known}")
    calls = [_call(call) for call in _without_nulls(message.get("tool_calls")) or ()]
    content = _content(message.get("content"), needed=not calls and role != "tool")
    if not content.strip() and not calls and role in ("user", "assistant"):
        raise SkdError(f"the {role}'s text is empty", hint=_REMOVE)
    more = {
        key: _without_nulls(value)
        for key, value in message.items()
        if value is not None and key not in ("role", "content", "tool_calls", "weight")
    }
    if role == "assistant":
        more |= {"tool_calls": calls} if calls else {}
        more |= {"weight": 0} if message.get("weight") == 0 else {}
    return {"role": role, "content": content, **more}


def _content(content: Any, *, needed: bool) -> str:
    if content is None and not needed:
        return ""
    if isinstance(content, str):
        return content
    if not _is_list(content):
        raise SkdError(f"`content` must be text, got {_kind(content)}", hint=_SHAPE)
    texts = []
    for part in content:
        kind = part.get("type", "text") if isinstance(part, Mapping) else None
        if kind not in _TEXT or not isinstance(part.get("text"), str):
            what = f"`content` has a part of the type {kind!r}" if kind else f"`content` has {_kind(part)} as a part"
            raise SkdError(f"{what}; only text is read", hint="remove this row, or the part")
        texts.append(part["text"])
    return "".join(texts)


def _call(call: Any) -> Any:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        hint = 'write {"type": "function", "function": {"name": "...", "arguments": {...}}}'
        raise SkdError("a call in `tool_calls` has no function with a name", hint=hint)
    arguments = _parsed(function.get("arguments", {}))
    parsed = {**function, "arguments": arguments}
    return {**call, "function": parsed} if "function" in call else parsed


def _parsed(value: Any) -> Any:
    """Return the value of a JSON text (a column of CSV holds nothing else), or the value itself."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        return value


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nulls(each) for key, each in value.items() if each is not None}
    return [_without_nulls(each) for each in value] if _is_list(value) else value


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _kind(value: Any) -> str:
    return "null" if value is None else type(value).__name__
