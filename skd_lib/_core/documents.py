"""Read YAML and JSON strictly: a text has one meaning, or is an error that names the line.

YAML is read as its core schema of version 1.2, and only where version 1.1 agrees: `010`, `1:30`, `no` and `2026-11-29`
mean other things to other readers, so they are refused until they are quoted or written out. (Numbers like `1e-5`,
which version 1.1 takes for text, are numbers.) Keys appear once, anchors are followed within limits, and tags are not.
"""

from __future__ import annotations

import json
import math
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from skd_lib.errors import SkdError

MAX_BYTES = 16 << 20
MAX_DEPTH = 64
MAX_VALUES = 200_000
"""Values in one document, those that aliases repeat included."""
MAX_DIGITS = 15
"""Whole numbers up to this length survive JSON, where they are doubles."""

_PARSER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the one in C is ten times as fast
_TEXT_TAGS = ("!", "tag:yaml.org,2002:str")
_NULL = frozenset({"", "~", "null", "Null", "NULL"})
_BOOLEANS = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]*)")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|(0|[1-9][0-9]*)(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_OTHER_NUMBER = re.compile(r"[-+]?(0o?[0-9_]+|0[xX][0-9a-fA-F_]+|0[bB][01_]+)(\.[0-9_]*)?([eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_MEANINGS = {"bool": "true or false", "int": "a number", "float": "a number", "timestamp": "a date"}
_PLAIN = {"true or false": "one of these words", "a number": "its decimal digits"}
_URI = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:/")
_SHOWN = 60
_MERGE = object()
_NOT_TEXT = re.compile("[\ud800-\udfff]")


def read_text(path: Path) -> str:
    """Read a text file that a person wrote; a file that is no such text is an SkdError."""
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):  # a pipe without a writer would block for ever
            kind = "a folder" if stat.S_ISDIR(found.st_mode) else "not a regular file"
            raise SkdError(f"cannot be read: it is {kind}", where=str(path), hint="name a file")
        if found.st_size > MAX_BYTES:
            raise SkdError(f"too large: {found.st_size:,} bytes, the limit is {MAX_BYTES:,}", where=str(path))
        return decoded(path.read_bytes(), where=str(path))
    except OSError as error:
        # `Path` makes one slash of the two of a URI.
        hint = "give the path of a file of this machine" if _URI.match(str(path)) else "check the path"
        raise SkdError(f"cannot be read: {error.strerror}", where=str(path), hint=hint) from error


def decoded(content: bytes, *, where: str) -> str:
    """Decode the text of a file that a person wrote; raises SkdError if it is too large, or not UTF-8."""
    if len(content) > MAX_BYTES:
        raise SkdError(f"too large: {len(content):,} bytes, the limit is {MAX_BYTES:,}", where=where)
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise SkdError(
            f"not UTF-8 text: byte {error.start + 1:,} is {error.object[error.start]:#04x}", where=where
        ) from error


def parse_yaml(text: str, *, where: str) -> Any:
    """Return the value of a YAML text with one document; None if it is empty. Errors (SkdError) name the line."""
    documents = _documents(text, where)
    value = next(documents, None)
    if next(documents, documents) is not documents:
        raise SkdError("more than one YAML document", where=where, hint="remove the line `---` and what follows it")
    return value


def parse_yaml_documents(text: str, *, where: str) -> list[Any]:
    """Return the values of all documents of a YAML text; see `parse_yaml`."""
    return list(_documents(text, where))


def parse_json(text: str | bytes, *, where: str, plain: bool = True) -> Any:
    """Return the value of a JSON text; `where` names it in errors.

    `plain` refuses numbers that are not finite or longer than every reader of JSON takes them, and halves of
    characters. It is False for results of our own, which hold texts of models. Raises SkdError also for a key that is
    there twice.
    """
    numbers: dict[str, Any] = {"parse_constant": _refused_constant, "parse_int": _integer, "parse_float": _finite}
    try:
        value = json.loads(text, object_pairs_hook=_unique, **(numbers if plain else {}))
        _check(value, plain)
    except RecursionError as error:
        raise SkdError(f"nested deeper than {MAX_DEPTH} levels", where=where) from error
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are two
        what = str(error) if isinstance(error, _Refused) else f"not JSON: {error}"
        raise SkdError(what, where=where, hint="pass it as one JSON value") from error
    return value


class _Refused(ValueError):
    """A value that is not allowed here."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise _Refused(f"the key {twice!r} is there twice")
    return values


def _refused_constant(name: str) -> Any:
    raise _Refused(f"{name} is no value here")


def _integer(text: str) -> int:
    if len(text.lstrip("+-")) > MAX_DIGITS:
        raise _Refused(f"a whole number of {len(text)} digits; the limit is {MAX_DIGITS}")
    return int(text)


def _finite(text: str) -> float:
    value = float(text) + 0.0  # -0.0 becomes 0.0
    if not math.isfinite(value):
        raise _Refused(f"the number {_short(text)} is too large")
    if not value and re.search("[1-9]", re.split("[eE]", text)[0]):
        raise _Refused(f"the number {_short(text)} is too small: it would be 0")
    return value


def _text(text: str) -> str:
    if found := _NOT_TEXT.search(text):
        raise _Refused(f"text with the character U+{ord(found[0]):04X}, which no file can hold")
    return text


def _check(value: Any, plain: bool) -> None:
    """Check the depth, and every text."""
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        inner: list[Any] = []
        for each in level:
            if isinstance(each, str) and plain:
                _text(each)
            elif isinstance(each, dict):
                inner += [*each, *each.values()]
            elif isinstance(each, list):
                inner += each
        if not inner:
            return
        level = inner
    raise _Refused(f"nested deeper than {MAX_DEPTH} levels")


@dataclass
class _Open:
    """A mapping or a sequence whose end has not been reached, with its anchor and its values by key or position.

    `lines` has the line of each key of a mapping, `key` the one whose value comes next (text or `_MERGE`; None if a key
    comes next), and `size` counts the values so far, itself included.
    """

    mapping: bool
    anchor: str | None
    values: dict[Any, Any] = field(default_factory=dict)
    lines: dict[str, int] = field(default_factory=dict)
    key: Any = None
    size: int = 1

    def close(self) -> Any:
        if not self.mapping:
            return list(self.values.values())
        parts = self.values.pop(_MERGE, [])
        merged: dict[str, Any] = {}
        for part in reversed(parts if isinstance(parts, list) else [parts]):
            if not isinstance(part, dict):
                raise _Refused("`<<` must be followed by a mapping")
            merged.update(part)
        return merged | self.values


def _documents(text: str, where: str) -> Iterator[Any]:
    """Build the value of each document from the parser's events, without recursion."""
    line = 1
    stack: list[_Open] = []
    try:
        for event in yaml.parse(text, Loader=_PARSER):
            line = event.start_mark.line + 1 if event.start_mark else line
            if isinstance(event, yaml.DocumentStartEvent):
                anchors: dict[str, tuple[Any, int]] = {}
                total = 0
                stack = [_Open(mapping=False, anchor=None)]
            elif isinstance(event, yaml.DocumentEndEvent):
                yield next(iter(stack.pop().values.values()))
            elif isinstance(event, yaml.CollectionStartEvent):
                if event.tag is not None:
                    raise _Refused(f"the YAML tag {_short(event.tag)} is not supported")
                if len(stack) > MAX_DEPTH:
                    raise _Refused(f"nested deeper than {MAX_DEPTH} levels")
                if stack[-1].mapping and stack[-1].key is None:
                    raise _Refused("a key must be text")
                stack.append(_Open(isinstance(event, yaml.MappingStartEvent), event.anchor))
            elif isinstance(event, yaml.CollectionEndEvent | yaml.ScalarEvent | yaml.AliasEvent):
                if isinstance(event, yaml.AliasEvent):
                    if event.anchor not in anchors:
                        raise _Refused(f"the alias *{_short(event.anchor or '')} has no anchor before it")
                    value, size = anchors[event.anchor]
                elif isinstance(event, yaml.ScalarEvent):
                    if stack[-1].mapping and stack[-1].key is None:
                        _open_key(stack[-1], event, line)
                        continue
                    value, size, anchor = _scalar(event), 1, event.anchor
                else:
                    closed = stack.pop()
                    value, size, anchor = closed.close(), closed.size, closed.anchor
                if not isinstance(event, yaml.AliasEvent) and anchor:
                    anchors[anchor] = value, size
                holder = stack[-1]
                if holder.mapping and holder.key is None:
                    raise _Refused("a key must be text")
                holder.values[holder.key if holder.mapping else len(holder.values)] = value
                holder.key, holder.size = None, holder.size + size
                total = max(total, sum(each.size for each in stack))
                if total > MAX_VALUES:
                    raise _Refused(f"more than {MAX_VALUES:,} values, those that aliases repeat included")
    except _Refused as error:
        path = ".".join(str(each.key) for each in stack if isinstance(each.key, str))
        raise SkdError(str(error), where=f"{where}, line {line}{f', field `{path}`' if path else ''}") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{where}, line {mark.line + 1}" if mark else where
        what = " ".join(filter(None, [error.context, error.problem]))
        raise SkdError(f"not YAML: {what}", where=place, hint="quote texts with special characters") from error
    except (yaml.YAMLError, UnicodeError) as error:
        raise SkdError(f"not YAML: {' '.join(str(error).split())}", where=where) from error


def _open_key(holder: _Open, event: yaml.ScalarEvent, line: int) -> None:
    if event.value == "<<" and event.implicit[0]:
        holder.key, name = _MERGE, "<<"
    else:
        value = _scalar(event)
        if not isinstance(value, str):
            raise _Refused(f"a key must be text: quote `{_short(event.value)}`")
        holder.key = name = value
    if name in holder.lines:
        raise _Refused(f"`{_short(name)}` is there twice, first in line {holder.lines[name]}: remove one")
    holder.lines[name] = line


def _scalar(event: yaml.ScalarEvent) -> Any:
    text = _text(event.value)
    if event.tag is not None and event.tag not in _TEXT_TAGS:
        raise _Refused(f"the YAML tag {_short(event.tag)} is not supported")
    if event.tag is not None or not event.implicit[0]:
        return text
    if text in _NULL:
        return None
    if text in _BOOLEANS:
        return _BOOLEANS[text]
    if _INTEGER.fullmatch(text):
        return _integer(text)
    if _FLOAT.fullmatch(text):
        return _finite(text)
    if _NOT_FINITE.fullmatch(text):
        raise _Refused(f"{text} is no value here: write a finite number")
    meant = "a number" if _OTHER_NUMBER.fullmatch(text) else _in_version_1_1(text)
    if meant:
        plain = f"; for {meant}, write {_PLAIN[meant]}" if meant in _PLAIN else ""
        raise _Refused(
            f"`{_short(text)}` is {meant} to some readers of YAML, and not to others; for a text, quote it{plain}"
        )
    return text


def _in_version_1_1(text: str) -> str:
    """Return the meaning of a plain scalar in YAML 1.1; empty for text."""
    resolvers = yaml.SafeLoader.yaml_implicit_resolvers
    for tag, pattern in [*resolvers.get(text[:1], []), *resolvers.get(None, [])]:
        if pattern.match(text):
            kind = str(tag).rpartition(":")[2]
            return _MEANINGS.get(kind, f"a sign for {kind}")
    return ""


def _short(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
