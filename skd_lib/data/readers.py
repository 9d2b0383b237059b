"""Reading the rows of data files: JSON Lines, JSON, CSV, tab-separated and Parquet, all but the last also gzipped.

A reader says where each row is and how to get its fields; whatever goes wrong in either, and with whatever library, is
turned into an error with file and row in one place, `guarded`.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeVar, cast

from skd_lib import storage
from skd_lib.config import Columns
from skd_lib.data.examples import Example
from skd_lib.data.files import COMPRESSED, ENDINGS, data_files, ending
from skd_lib.data.rows import HINT_BROKEN, QUICK_CHARACTERS, Labels, Problems, check_columns, check_rows, listed, short
from skd_lib.errors import SkdError, SkdErrors

MAX_ROW_BYTES = 64 * 2**20
"""Of a row in a text file, with the columns that are not read."""
MAX_EMPTY_LINES = 1_000_000
_BATCH = 1000
_CHUNK = 2**16
_SPACE = re.compile(r"\s*")
Fields = dict[str, Any]
T = TypeVar("T")


class RawRow(NamedTuple):
    """Where a row is, and what gives its fields or raises what is wrong with it."""

    where: str
    fields: Callable[[], Fields]


class Table(NamedTuple):
    """The rows of an open file, and the names of labels that it knows."""

    rows: Iterator[RawRow]
    labels: Labels | None = None


def read_file(
    stream: IO[bytes], name: str, columns: Columns, problems: Problems, max_rows: int | None = None
) -> list[Example]:
    """Read the examples of one file; what is wrong goes to `problems`.

    Args:
        stream: The file's content; Parquet needs a stream that can seek.
        name: Path or URI; its ending says which format it is.
        columns: Names of the source's and the target's columns.
        problems: Where errors are noted, with file, row and field. Rows are counted from 1; a CSV header is no row.
        max_rows: Read at most this many, and not more of them than `QUICK_CHARACTERS` hold.

    Raises:
        SkdErrors: there are too many problems to go on.
    """
    found = ending(name)
    if found is None:
        hint = f"use one of: {', '.join(ENDINGS)}, or {COMPRESSED} of all but Parquet"
        problems.add(SkdError("unknown kind of data file", where=name, hint=hint))
        return []
    kind, read = _READERS[found]
    if name.lower().endswith(COMPRESSED):
        stream = cast(IO[bytes], gzip.GzipFile(fileobj=stream))
    table = _attempt(lambda: read(stream, name, columns), f"not a {kind} file", name, problems)
    if table is None:
        return []
    rows = guarded(islice(table.rows, max_rows), kind, name, problems)
    return check_rows(rows, columns, problems, table.labels, None if max_rows is None else QUICK_CHARACTERS)


def read_lines(path: Path, limit: int) -> list[str]:
    """The first lines of a text file that are not blank. A line ends with a line feed, a carriage return or both.

    Raises:
        SkdErrors: a line is no UTF-8, or too long.
        SkdError: the file cannot be read.
    """
    problems = Problems()
    file = str(path)
    if data_files(file) != [file]:
        raise SkdError("this is no text file", where=file, hint="name one file")
    with storage.open_binary(file) as stream:
        lines = (line for line in _text_lines(stream) if line.strip())
        rows = (
            RawRow(f"{file}, row {number}", partial(dict, text=line.rstrip("\r\n")))
            for number, line in enumerate(lines, start=1)
        )
        columns = Columns(source="text", target="text")
        found = check_rows(guarded(islice(rows, limit), "text", file, problems), columns, problems)
    problems.raise_any()
    return [example.source for example in found]


def guarded(rows: Iterator[RawRow], kind: str, name: str, problems: Problems) -> Iterator[tuple[str, Fields]]:
    """Where each row is, and its fields; what cannot be read is noted, whatever was raised.

    After a row whose fields cannot be had reading goes on, after an error between rows it ends.

    Args:
        rows: The rows.
        kind: What they are, for the error: `JSON`.
        name: The file or dataset.
        problems: Where errors are noted.
    """
    number, what = 0, f"broken {kind}"
    while row := _attempt(lambda: next(rows, None), what, f"{name}, row {number + 1}", problems):
        number += 1
        fields = _attempt(row.fields, what, row.where, problems)
        if fields is not None:
            yield row.where, fields


def _attempt(look: Callable[[], T], what: str, where: str, problems: Problems) -> T | None:
    """What `look` gives; None where it raises anything, which is noted: what a library raises is about the file."""
    try:
        return look()
    except Exception as error:  # noqa: BLE001
        for each in _explained(error, what, where):
            problems.add(each)
        return None


def _explained(error: Exception, what: str, where: str) -> list[SkdError]:
    """An error of any reader as sentences with a place; one that has a sentence keeps it."""
    if isinstance(error, SkdErrors):
        return error.errors
    if isinstance(error, SkdError):
        return [SkdError(error.what, where=error.where or where, hint=error.hint)]
    if isinstance(error, UnicodeDecodeError):
        return [SkdError(f"not UTF-8 text: {error}", where=where, hint="convert the file to UTF-8")]
    if isinstance(error, json.JSONDecodeError):
        return [SkdError(f"{what}: {error.msg} (column {error.colno})", where=where, hint=HINT_BROKEN)]
    told = str(error).strip().partition("\n")[0] or type(error).__name__
    return [SkdError(f"{what}: {told[:300]}", where=where, hint="check this row and the file, or write it again")]


# --- lines --------------------------------------------------------------------------------------------------------


def _lines(stream: IO[bytes]) -> Iterator[bytes]:
    """The lines of a file; neither one without an end nor a file of empty ones is read for ever.

    Raises:
        SkdError: a line is too long, or too many are empty.
    """
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


def _text_lines(stream: IO[bytes]) -> Iterator[str]:
    """The same as text; a lone carriage return ends a line too, as `csv` wants it."""
    for number, line in enumerate(_lines(stream)):
        text = line.decode("utf-8" if number else "utf-8-sig")
        if "\r" in text[:-2]:
            yield from io.StringIO(text, newline="")
        else:
            yield text


# --- JSON ---------------------------------------------------------------------------------------------------------


def _jsonl(stream: IO[bytes], name: str, _columns: Columns) -> Table:
    return Table(
        RawRow(f"{name}, row {number}", partial(_json_line, line, number))
        for number, line in enumerate(_lines(stream), start=1)
        if line.strip()
    )


def _json_line(line: bytes, number: int) -> Fields:
    keys = _Keys()
    text = line.rstrip().decode("utf-8-sig" if number == 1 else "utf-8")
    return keys.checked(json.loads(text, object_pairs_hook=keys))


class _Keys:
    """Makes objects of their pairs, and remembers which keys the last one had twice: it is the outermost one."""

    def __init__(self) -> None:
        self.repeated: list[str] = []

    def __call__(self, pairs: list[tuple[str, Any]]) -> Fields:
        fields = dict(pairs)
        self.repeated = []
        if len(fields) < len(pairs):
            self.repeated = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
        return fields

    def checked(self, value: Any) -> Fields:
        """The value, if it is a row.

        Raises:
            SkdError: it is no object, or has a key twice.
        """
        if not isinstance(value, dict):
            what = f"must be a JSON object, got {type(value).__name__} {short(value)}"
            raise SkdError(what, hint='write {"source": "...", "target": "..."}')
        if self.repeated:
            raise SkdError(f"the row has several fields of one name: {listed(self.repeated)}", hint="keep one of them")
        return value


def _json(stream: IO[bytes], name: str, _columns: Columns) -> Table:
    """An array of objects, or objects one after the other, read piece by piece."""
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
        """The next character that is no space; empty at the end."""
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
        """What gives the next value, which must be an object."""
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


# --- tables of text -----------------------------------------------------------------------------------------------


def _csv(stream: IO[bytes], name: str, columns: Columns) -> Table:
    csv.field_size_limit(MAX_ROW_BYTES)  # the library's own, 131,072, is less than a long document
    reader = csv.reader(_text_lines(stream), strict=True)
    header = next(filter(None, reader), [])
    check_columns(header, name, columns)
    return Table(_records(reader, header, name))


def _tsv(stream: IO[bytes], name: str, columns: Columns) -> Table:
    """Tab-separated as IANA, Tatoeba and OPUS have it: quotation marks are text.

    Some programs quote every text as in CSV: a file is read so if its header is in quotation marks, or all fields of a
    column that is read. Where others do so now and then, a field that no person writes (`"a ""b"" c"`) is refused.
    """
    csv.field_size_limit(MAX_ROW_BYTES)
    lines = _text_lines(stream)
    head = list(islice(lines, _BATCH))
    as_csv = _is_quoted([line.rstrip("\r\n").split("\t") for line in head if line.strip()], columns)
    every = chain(head, lines)
    reader = (
        csv.reader(every, delimiter="\t", strict=True)
        if as_csv
        else csv.reader(every, delimiter="\t", quoting=csv.QUOTE_NONE)
    )
    header = next(filter(None, reader), [])
    check_columns(header, name, columns)
    rows = _records(reader, header, name)
    return Table(rows if as_csv else (RawRow(where, partial(_unquoted, row, columns)) for where, row in rows))


def _is_quoted(head: list[list[str]], columns: Columns) -> bool:
    """Whether the first lines of a table look as if every text were in quotation marks."""
    header, rows = (head[0], head[1:]) if head else ([], [])
    places = [place for place, field in enumerate(header) if field in columns.names]
    quoted = (all(place < len(row) and _in_quotes(row[place]) for row in rows) for place in places)
    return any(map(_in_quotes, header)) or (len(rows) > 1 and any(quoted))


def _records(reader: Any, header: list[str], name: str) -> Iterator[RawRow]:
    for number, fields in enumerate(filter(None, reader), start=1):
        yield RawRow(f"{name}, row {number} (line {reader.line_num})", partial(_record, header, fields))


def _record(header: list[str], fields: list[str]) -> Fields:
    if len(fields) != len(header):
        what = f"the number of fields, {len(fields)}, differs from the header's, {len(header)}"
        raise SkdError(what, hint="quote a field that holds the delimiter or a line break; in .tsv it can hold neither")
    return dict(zip(header, fields, strict=True))


def _unquoted(fields: Callable[[], Fields], columns: Columns) -> Fields:
    row = fields()
    for column in columns.names:
        text = row[column]
        inner = text[1:-1]
        if text == '""' or (_in_quotes(text) and '"' in inner and '"' not in inner.replace('""', "")):
            hint = "quote every field or none, or write the file as .csv (with commas) or .jsonl"
            raise SkdError(f"the field `{column}` is quoted as in CSV, the file is not: {short(text)}", hint=hint)
    return row


def _in_quotes(field: str) -> bool:
    return len(field) > 1 and field[0] == field[-1] == '"'


# --- Parquet ------------------------------------------------------------------------------------------------------


def _parquet(stream: IO[bytes], name: str, columns: Columns) -> Table:
    import pyarrow.parquet

    file = pyarrow.parquet.ParquetFile(stream)
    check_columns(file.schema_arrow.names, name, columns)
    return Table(_parquet_rows(file, name, columns), _labels(file.schema_arrow, columns))


def _parquet_rows(file: Any, name: str, columns: Columns) -> Iterator[RawRow]:
    first = 1
    for batch in map(_shortest, file.iter_batches(batch_size=_BATCH, columns=columns.names)):
        rows: Iterable[Callable[[], Fields]]
        try:
            rows = [partial(dict, fields) for fields in batch.to_pylist()]
        except Exception:  # noqa: BLE001 - a value that Python cannot have; which one is seen when each is asked for
            rows = [partial(_parquet_row, batch, offset) for offset in range(batch.num_rows)]
        yield from (RawRow(f"{name}, row {number}", row) for number, row in enumerate(rows, start=first))
        first += batch.num_rows


def _parquet_row(batch: Any, offset: int) -> Fields:
    (fields,) = batch.slice(offset, 1).to_pylist()
    return dict(fields)


def _shortest(batch: Any) -> Any:
    """The batch with single-precision numbers as people wrote them: 0.1, not 0.10000000149011612."""
    import pyarrow

    for place, field in enumerate(batch.schema):
        if pyarrow.types.is_float32(field.type):
            column = batch.column(place).cast(pyarrow.string()).cast(pyarrow.float64())
            batch = batch.set_column(place, field.name, column)
    return batch


def _labels(schema: Any, columns: Columns) -> Labels:
    """Names of labels that the library `datasets` left in a Parquet file; it does not know every other type."""
    if not columns.cast:
        return {}
    import pyarrow
    from datasets import Features

    cast = [schema.field(name) for name in columns.cast if pyarrow.types.is_integer(schema.field(name).type)]
    return class_labels(Features.from_arrow_schema(pyarrow.schema(cast, schema.metadata)))


def class_labels(features: Mapping[str, Any] | None) -> Labels:
    """The names of the values of each column that is a ClassLabel."""
    from datasets import ClassLabel

    return {name: kind.names for name, kind in (features or {}).items() if isinstance(kind, ClassLabel) and kind.names}


_READERS: dict[str, tuple[str, Callable[[IO[bytes], str, Columns], Table]]] = {
    ".jsonl": ("JSON", _jsonl),
    ".ndjson": ("JSON", _jsonl),
    ".json": ("JSON", _json),
    ".csv": ("CSV", _csv),
    ".tsv": ("TSV", _tsv),
    ".parquet": ("Parquet", _parquet),
}
