"""An example, and the JSONL files that hold prepared examples."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from skd_lib import storage
from skd_lib.data.conversations import Conversation, as_text
from skd_lib.errors import SkdError

Question = str | Conversation
"""What a model is asked: the text that a task's prompt is made of, or a conversation, whose answer is left out."""


@dataclass(frozen=True, slots=True)
class Example:
    """An input and its reference answer.

    Attributes:
        id: Names the example across splits, orders and runs: derived from its content (`make_example`).
        source: The input text; of a conversation, what `Conversation.question` says.
        target: The reference answer; empty where there is none.
        origin: File and row, dataset and row, or package and catalog.
        conversation: The messages, the answer's last, where the input is more than a text.
    """

    id: str
    source: str
    target: str
    origin: str = ""
    conversation: Conversation | None = None

    @property
    def question(self) -> Question:
        """Return what a model is asked: the conversation if there is one, else the input text."""
        return self.source if self.conversation is None else self.conversation

    @property
    def place(self) -> str:
        """Return the example's origin, or its id where that is unknown, for messages."""
        return self.origin or f"example {self.id}"


def make_example(source: str, target: str, origin: str = "") -> Example:
    """Return an example whose id is the first 16 hex digits of the sha256 of its content."""
    digest = hashlib.sha256(json.dumps([source, target]).encode()).hexdigest()
    return Example(digest[:16], source, target, origin)


def conversation_example(conversation: Conversation, origin: str = "") -> Example:
    """Return the example of a conversation: its answer, after all that comes before."""
    target = "" if conversation.answer is None else as_text(conversation.answer)
    content = json.dumps(conversation.to_dict(), sort_keys=True)
    digest = hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()
    return Example(digest[:16], conversation.question(), target, origin, conversation)


def by_turn(example: Example) -> list[Example]:
    """Return an example for each answer of a conversation that counts in training; else the example itself."""
    turns = [] if example.conversation is None else example.conversation.turns()
    if len(turns) < 2:
        return [example]
    return [
        conversation_example(turn, f"{example.place}, answer {number} of {len(turns)}")
        for number, turn in enumerate(turns, start=1)
    ]


def write_jsonl(path: Path, examples: Iterable[Example]) -> None:
    """Write one JSON object a line; the file appears only when it is complete."""
    lines = [json.dumps(_to_dict(example), ensure_ascii=False) + "\n" for example in examples]
    storage.write_text_atomic(path, "".join(lines))


def read_jsonl(path: Path) -> list[Example]:
    """Read a file of `write_jsonl`."""
    examples = []
    # Split at newlines only: JSON strings may hold other line separators, which `str.splitlines` would cut at.
    for number, line in enumerate(storage.read_bytes(str(path)).split(b"\n"), start=1):
        if not line:
            continue
        try:
            examples.append(_from_dict(json.loads(line)))
        except (ValueError, TypeError, KeyError) as error:
            hint = "make the prepared data again: run the step prepare_data"
            raise SkdError(f"not a prepared example: {error}", where=f"{path}, line {number}", hint=hint) from error
    return examples


def _to_dict(example: Example) -> dict[str, Any]:
    values = {"id": example.id, "source": example.source, "target": example.target, "origin": example.origin}
    return values if example.conversation is None else values | {"conversation": example.conversation.to_dict()}


def _from_dict(values: dict[str, Any]) -> Example:
    talk = values.pop("conversation", None)
    return Example(**values, conversation=None if talk is None else Conversation.from_dict(talk))
