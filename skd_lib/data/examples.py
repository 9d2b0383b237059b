"""An example, and the JSONL files that hold prepared examples."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from skd_lib import storage
from skd_lib.errors import SkdError


@dataclass(frozen=True, slots=True)
class Example:
    """An input text and its reference answer.

    Attributes:
        id: Names the example across splits, orders and runs: derived from its content (`make_example`).
        source: The input text.
        target: The reference answer.
        origin: File and row, dataset and row, or package and catalog.
    """

    id: str
    source: str
    target: str
    origin: str = ""

    @property
    def place(self) -> str:
        """Return the example's origin, or its id where that is unknown, for messages."""
        return self.origin or f"example {self.id}"


def make_example(source: str, target: str, origin: str = "") -> Example:
    """Return an example whose id is the first 16 hex digits of the sha256 of its content."""
    digest = hashlib.sha256(json.dumps([source, target]).encode()).hexdigest()
    return Example(digest[:16], source, target, origin)


def write_jsonl(path: Path, examples: Iterable[Example]) -> None:
    """Write one JSON object a line; the file appears only when it is complete."""
    lines = [json.dumps(asdict(example), ensure_ascii=False) + "\n" for example in examples]
    storage.write_text_atomic(path, "".join(lines))


def read_jsonl(path: Path) -> list[Example]:
    """Read a file of `write_jsonl`."""
    examples = []
    # Split at newlines only: JSON strings may hold other line separators, which `str.splitlines` would cut at.
    for number, line in enumerate(storage.read_bytes(str(path)).split(b"\n"), start=1):
        if not line:
            continue
        try:
            examples.append(Example(**json.loads(line)))
        except (ValueError, TypeError) as error:
            hint = "make the prepared data again: run the step prepare_data"
            raise SkdError(f"not a prepared example: {error}", where=f"{path}, line {number}", hint=hint) from error
    return examples
