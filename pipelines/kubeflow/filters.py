"""The server's filter of a list by name, and which of the items found has that name."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any, TypeVar

T = TypeVar("T")


def name_filter(name: str, key: str = "display_name") -> str:
    """Return the filter for the items whose field `key` equals `name`.

    The server decodes a filter from a URL once more than it was encoded (`parseAPIFilter` in
    backend/src/apiserver/server/list_request_util.go): a `+` becomes a space, and a `%` that begins no code an error.
    As escapes of JSON both arrive however often it is decoded.
    """
    predicate = {"operation": "EQUALS", "key": key, "string_value": name}
    text = json.dumps({"predicates": [predicate]})
    return text.replace("+", "\\u002b").replace("%", "\\u0025")


def best_named(items: Iterable[T], name: str, key: str) -> T | None:
    """Return the item of exactly that name, else one that the server takes for it, else None.

    MySQL's usual collation knows neither case nor accents: a list for `Exp` may hold `exp`, and then the server
    refuses to make `Exp`.
    """
    found = list(items)
    exact = (item for item in found if getattr(item, key, None) == name)
    return next(exact, found[0] if found else None)


def exactly_named(items: Iterable[Any], name: str) -> list[Any]:
    """Return the items of exactly that display name; the server's list may hold others, see `best_named`."""
    return [item for item in items if item.display_name == name]
