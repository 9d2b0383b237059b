r"""JSON that arrives in a step unchanged, for any texts in it.

On the way through Kubeflow a parameter's text is read by others: kubelet takes `$(HOME)` and `$$` for its own, Argo
`{{= 1 + 1 }}`, KFP `{{$}}` and `[[CurrentTime]]`, and a database of three bytes a character refuses an emoji. In a
*string* parameter of JSON of printable ASCII, in which `$`, `{`, `}`, `[` and `]` inside of texts are written as
\u0024, \u007b and so on, none of them finds anything.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

REMEDY = (
    r"write it as JSON does: \u0024 for $, \u007b\u007b for {{ and \u007d\u007d for }}, or give the URI of a YAML file"
)
_TEXT = re.compile(r'"(?:[^"\\]|\\.)*"', re.DOTALL)
_READ_BY_OTHERS = re.compile(r"[${}\[\]]|[^ -~]")
_PLAIN = re.compile(r"[ -~]*")
_CHANGED = re.compile(r"\$|\{\{|\}\}")
_MARK = "\ud800"  # no text of JSON that people may write holds half a character


def ascii_json(value: Any, *, compact: bool = True) -> str:
    """Write plain values as JSON that arrives unchanged; `compact` leaves out the spaces that people like."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":") if compact else None)
    return _in_texts(text, lambda inner: _READ_BY_OTHERS.sub(_escaped, inner))


def is_plain(text: str) -> bool:
    """Return whether a text arrives unchanged without being written as JSON."""
    return _PLAIN.fullmatch(text) is not None and not set(text) & set("${}") and "[[" not in text


def may_be_changed(text: str) -> bool:
    """Return whether a text that has arrived may have been sent as another one."""
    return _CHANGED.search(text) is not None


def changed_fields(text: str) -> list[str]:
    """Return the dotted names of values and keys in a JSON text that may have been sent as other texts."""
    return list(dict.fromkeys(_marked(json.loads(_in_texts(text, lambda inner: _CHANGED.sub(_MARK, inner))))))


def _in_texts(text: str, change: Callable[[str], str]) -> str:
    return _TEXT.sub(lambda found: change(found[0]), text)


def _escaped(found: re.Match[str]) -> str:
    return f"\\u{ord(found[0]):04x}"


def _marked(value: Any, path: tuple[str, ...] = ()) -> Iterator[str]:
    if isinstance(value, str) and _MARK in value:
        yield ".".join(path)
    elif isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            if isinstance(key, str) and _MARK in key:
                yield ".".join((*path, key.replace(_MARK, "...")))
            yield from _marked(inner, (*path, str(key)))
