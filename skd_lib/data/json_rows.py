"""Rows of JSON Lines and JSON files, and the lines of text files, read piece by piece within limits on their length."""

from __future__ import annotations

import codecs
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import IO, Any, NamedTuple

from skd_lib.config import Columns
from skd_lib.data.rows import HINT_BROKEN, Labels, listed
from skd_lib.errors import SkdError

MAX_ROW_BYTES = 64 * 2**20
"""Of a row in a text file, with the columns that are not read."""
MAX_EMPTY_LINES = 1_000_000
_CHUNK = 2**16
_SPACE = re.compile(r"\s*")
Fields = dict[str, Any]


class RawRow(NamedTuple):
    """The place of a row, and a function that returns its fields or raises what is wrong with it."""

    where: str
    fields: Callable[[], Fields]


class Table(NamedTuple):
    """The rows of an open file, and the names of labels that it knows."""

    rows: Iterator[RawRow]
    labels: Labels | None = None


def byte_lines(stream: IO[bytes]) -> Iterator[bytes]:
    """Yield the lines of a file."""
    # Streams of object storage would read a line byte by byte.
    buffered: Any = stream if hasattr(stream, "peek") else io.BufferedReader(stream)
    empty = 0
    while line := buffered.readline(MAX_ROW_BYTES + 1):
        empty = 0 if line.strip() else empty + 1
        if len(line) > MAX_ROW_BYTES:
            raise _too_long()
        if empty > MAX_EMPTY_LINES:
            raise SkdError(f"more than {MAX_EMPTY_LINES:,} empty lines", hint="check that this is a data file")
        yield line


def _too_long() -> SkdError:
    what = f"a row has more than {MAX_ROW_BYTES // 2**20} MiB; reading stops here"
    return SkdError(what, hint="check that this is a data file with rows, and remove this one")


def text_lines(stream: IO[bytes]) -> Iterator[str]:
    """Yield lines as text; a lone carriage return ends a line too, as `csv` wants it."""
    for number, line in enumerate(byte_lines(stream)):
        text = line.decode("utf-8" if number else "utf-8-sig")
        if "\r" in text[:-2]:
            yield from io.StringIO(text, newline="")
        else:
            yield text


def read_jsonl_table(stream: IO[bytes], name: str, _columns: Columns | None) -> Table:
    """Read JSON Lines: an object a line."""
    return Table(
        RawRow(f"{name}, row {number}", partial(_json_line, line, number))
        for number, line in enumerate(byte_lines(stream), start=1)
        if line.strip()
    )


def _json_line(line: bytes, number: int) -> Fields:
    keys = _Keys()
    text = line.rstrip().decode("utf-8-sig" if number == 1 else "utf-8")
    return keys.checked(json.loads(text, object_pairs_hook=keys))


class _Keys:
    """Builds objects from pairs, and remembers which keys the last, outermost one had twice."""

    def __init__(self) -> None:
        self.repeated: list[str] = []

    def __call__(self, pairs: list[tuple[str, Any]]) -> Fields:
        fields = dict(pairs)
        self.repeated = []
        if len(fields) < len(pairs):
            self.repeated = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
        return fields

    def checked(self, value: Any) -> Fields:
        """Return the value, if it is a row."""
        if not isinstance(value, dict):
            what = f"must be a JSON object, got {type(value).__name__}"
            raise SkdError(what, hint='write {"source": "...", "target": "..."}')
        if self.repeated:
            raise SkdError(f"the row has several fields of one name: {listed(self.repeated)}", hint="keep one of them")
        return value


def read_json_table(stream: IO[bytes], name: str, _columns: Columns | None) -> Table:
    """Read an array of objects, or objects one after the other."""
    return Table(
        RawRow(f"{name}, row {number}", row) for number, row in enumerate(_json_rows(_JsonText(stream)), start=1)
    )


def _json_rows(text: _JsonText) -> Iterator[Callable[[], Fields]]:
    in_array = text.peek() == "["
    if in_array:
        text.take("[")
    end = "]" if in_array else ""
    more = text.peek() != end
    while more:
        yield text.row()
        more = text.peek() != end
        if in_array and more:
            text.take(",")
    if in_array:
        text.take("]")
        if text.peek():
            raise SkdError("broken JSON: something follows the array", hint="keep one array a file")


class _JsonText:
    """JSON of any length, of which one value at a time is in memory."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._text, self._at, self._ended = "", 0, False

    def peek(self) -> str:
        """Return the next character that is no space; empty at the end."""
        spaces = 0
        while True:
            start = self._at
            self._at = _SPACE.match(self._text, self._at).end()  # type: ignore[union-attr]
            spaces += self._at - start
            if self._at < len(self._text) or self._ended:
                return self._text[self._at : self._at + 1]
            self._check_length(spaces)
            self._read(_CHUNK)

    def take(self, wanted: str) -> None:
        """Go past one character, which must be this one."""
        if self.peek() != wanted:
            raise SkdError(f"broken JSON: a {wanted} is missing after the row before", hint=HINT_BROKEN)
        self._at += 1

    def row(self) -> Callable[[], Fields]:
        """Parse the next value, and return a function that checks that it is an object."""
        self.peek()
        keys, size = _Keys(), _CHUNK
        decoder = json.JSONDecoder(object_pairs_hook=keys)
        while True:
            try:
                value, self._at = decoder.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                if self._ended:
                    raise SkdError(f"broken JSON: {error.msg}", hint=HINT_BROKEN) from error
                self._check_length(len(self._text) - self._at)
                self._read(size)
                size *= 2  # so that parsing a long row again and again costs twice as much as once
            else:
                return partial(keys.checked, value)

    def _read(self, size: int) -> None:
        piece = self._stream.read(size)
        self._ended = not piece
        self._text = self._text[self._at :] + self._decoder.decode(piece, final=self._ended)
        self._at = 0

    def _check_length(self, characters: int) -> None:
        if characters > MAX_ROW_BYTES:
            raise _too_long()
