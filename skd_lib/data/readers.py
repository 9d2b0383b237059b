"""Readers of data files: JSON Lines, JSON, CSV, tab-separated and Parquet, all but the last also gzipped.

A reader yields the place of each row and a function that returns its fields: those of given columns, else all.
Any error of either, and of any library, becomes an error with file and row in one place, `guarded`.
"""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any, TypeVar, cast

from skd_lib import storage
from skd_lib._core.format import first_line
from skd_lib.config import Columns
from skd_lib.data.examples import Example
from skd_lib.data.files import COMPRESSED, ENDINGS, data_files, ending
from skd_lib.data.json_rows import MAX_ROW_BYTES, Fields, RawRow, Table, read_json_table, read_jsonl_table, text_lines
from skd_lib.data.rows import HINT_BROKEN, NAMED_ROWS, QUICK_CHARACTERS, Labels, Problems, check_columns, check_rows
from skd_lib.errors import SkdError, SkdErrors

T = TypeVar("T")
_BATCH = 1000


def first_names(stream: IO[bytes], name: str) -> list[str]:
    """Return the names of the fields in a file's first `NAMED_ROWS` rows, or in those that can be read."""
    found = ending(name)
    names: dict[str, None] = {}
    with suppress(Exception):  # reading the file tells what is wrong with it
        _, read = _READERS[found or ""]
        for row in islice(read(_uncompressed(stream, name), name, None).rows, NAMED_ROWS):
            names.update(dict.fromkeys(row.fields()))
    return list(names)


def read_rows(path: str | Path) -> list[Fields]:
    """Return the rows of a file, folder or glob with all their fields, as `SKDTrainer` and `tokenize_row` take them."""
    problems, found = Problems(), list[Fields]()
    for name in data_files(str(path)):
        kind, read = _READERS[ending(name) or ".jsonl"]
        with storage.open_binary(name) as stream:
            rows = read(_uncompressed(stream, name), name, None).rows
            found += [fields for _, fields in guarded(rows, kind, name, problems)]
    problems.raise_any()
    return found


def read_file(
    stream: IO[bytes], name: str, columns: Columns, problems: Problems, max_rows: int | None = None
) -> list[Example]:
    """Read the examples of one file, whose name ends as its format does; what is wrong goes to `problems`.

    Rows are counted from 1; a CSV header is no row. With `max_rows`, no more than `QUICK_CHARACTERS` are read either.
    Parquet needs a stream that can seek.
    """
    found = ending(name)
    if found is None:
        hint = f"use one of: {', '.join(ENDINGS)}, or {COMPRESSED} of all but Parquet"
        problems.add(SkdError("unknown kind of data file", where=name, hint=hint))
        return []
    kind, read = _READERS[found]
    table = _attempt(lambda: read(_uncompressed(stream, name), name, columns), f"not a {kind} file", name, problems)
    if table is None:
        return []
    rows = guarded(islice(table.rows, max_rows), kind, name, problems)
    return check_rows(rows, columns, problems, table.labels, None if max_rows is None else QUICK_CHARACTERS)


def _uncompressed(stream: IO[bytes], name: str) -> IO[bytes]:
    return cast(IO[bytes], gzip.GzipFile(fileobj=stream)) if name.lower().endswith(COMPRESSED) else stream


def read_lines(path: Path, limit: int) -> list[str]:
    """Read the first lines of a text file that are not blank; each ends with a line feed, a carriage return or both."""
    problems = Problems()
    file = str(path)
    if data_files(file) != [file]:
        raise SkdError("this is no text file", where=file, hint="name one file")
    with storage.open_binary(file) as stream:
        lines = (line for line in text_lines(stream) if line.strip())
        rows = (
            RawRow(f"{file}, row {number}", partial(dict, text=line.rstrip("\r\n")))
            for number, line in enumerate(lines, start=1)
        )
        columns = Columns(source="text", target="text")
        found = check_rows(guarded(islice(rows, limit), "text", file, problems), columns, problems)
    problems.raise_any()
    return [example.source for example in found]


def guarded(rows: Iterator[RawRow], kind: str, name: str, problems: Problems) -> Iterator[tuple[str, Fields]]:
    """Yield the place and the fields of each row, and note any error.

    Reading goes on after a row whose fields cannot be read, and ends after an error between rows. Errors name the kind
    of data (`JSON`), and the name of the file or dataset.
    """
    number, what = 0, f"broken {kind}"
    while row := _attempt(lambda: next(rows, None), what, f"{name}, row {number + 1}", problems):
        number += 1
        fields = _attempt(row.fields, what, row.where, problems)
        if fields is not None:
            yield row.where, fields


def _attempt(look: Callable[[], T], what: str, where: str, problems: Problems) -> T | None:
    """Return the result of `look`, or None where it raises anything, which is noted: it is about the file."""
    try:
        return look()
    except Exception as error:  # noqa: BLE001
        for each in _explained(error, what, where):
            problems.add(each)
        return None


def _explained(error: Exception, what: str, where: str) -> list[SkdError]:
    """Turn an error of any reader into sentences with a place; one that has a sentence keeps it."""
    if isinstance(error, SkdErrors):
        return error.errors
    if isinstance(error, SkdError):
        return [SkdError(error.what, where=error.where or where, hint=error.hint)]
    if isinstance(error, UnicodeDecodeError):
        return [SkdError(f"not UTF-8 text: {error}", where=where, hint="convert the file to UTF-8")]
    if isinstance(error, json.JSONDecodeError):
        return [SkdError(f"{what}: {error.msg} (column {error.colno})", where=where, hint=HINT_BROKEN)]
    hint = "check this row and the file, or write it again"
    return [SkdError(f"{what}: {first_line(error)[:300]}", where=where, hint=hint)]


# --- tables of text -----------------------------------------------------------------------------------------------


def _csv(stream: IO[bytes], name: str, columns: Columns | None) -> Table:
    csv.field_size_limit(MAX_ROW_BYTES)  # the library's own, 131,072, is less than a long document
    reader = csv.reader(text_lines(stream), strict=True)
    header = next(filter(None, reader), [])
    if columns is not None:
        check_columns(header, name, columns)
    return Table(_records(reader, header, name))


def _tsv(stream: IO[bytes], name: str, columns: Columns | None) -> Table:
    """Read a tab-separated table as IANA, Tatoeba and OPUS have it: quotation marks are text.

    Some programs quote every text as in CSV: a file is read so if its header is in quotation marks, or all fields of a
    column that is read. Where others do so now and then, a field that no person writes (`"a ""b"" c"`) is refused.
    """
    csv.field_size_limit(MAX_ROW_BYTES)
    lines = text_lines(stream)
    head = list(islice(lines, _BATCH))
    as_csv = _is_quoted([line.rstrip("\r\n").split("\t") for line in head if line.strip()], columns)
    every = chain(head, lines)
    reader = (
        csv.reader(every, delimiter="\t", strict=True)
        if as_csv
        else csv.reader(every, delimiter="\t", quoting=csv.QUOTE_NONE)
    )
    header = next(filter(None, reader), [])
    if columns is not None:
        check_columns(header, name, columns)
    rows = _records(reader, header, name)
    if as_csv or columns is None:
        return Table(rows)
    return Table((RawRow(where, partial(_unquoted, row, columns)) for where, row in rows))


def _is_quoted(head: list[list[str]], columns: Columns | None) -> bool:
    """Return whether the first lines of a table look as if every text were in quotation marks."""
    header, rows = (head[0], head[1:]) if head else ([], [])
    places = [place for place, field in enumerate(header) if columns is None or field in columns.names]
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
            raise SkdError(f"the field `{column}` is quoted as in CSV, the file is not", hint=hint)
    return row


def _in_quotes(field: str) -> bool:
    return len(field) > 1 and field[0] == field[-1] == '"'


# --- Parquet ------------------------------------------------------------------------------------------------------


def _parquet(stream: IO[bytes], name: str, columns: Columns | None) -> Table:
    import pyarrow.parquet

    file = pyarrow.parquet.ParquetFile(stream)
    names = file.schema_arrow.names
    if columns is None:
        return Table(_parquet_rows(file, name, names, 1))
    check_columns(names, name, columns)
    return Table(_parquet_rows(file, name, columns.among(names), _BATCH), _labels(file.schema_arrow, columns))


def _parquet_rows(file: Any, name: str, columns: list[str], size: int) -> Iterator[RawRow]:
    first = 1
    for batch in map(_shortest, file.iter_batches(batch_size=size, columns=columns)):
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
    """Return a batch with single-precision numbers as people wrote them: 0.1, not 0.10000000149011612."""
    import pyarrow

    for place, field in enumerate(batch.schema):
        if pyarrow.types.is_float32(field.type):
            column = batch.column(place).cast(pyarrow.string()).cast(pyarrow.float64())
            batch = batch.set_column(place, field.name, column)
    return batch


def _labels(schema: Any, columns: Columns) -> Labels:
    """Return the names of labels that the library `datasets` left in a Parquet file; it does not know all types."""
    if not columns.cast:
        return {}
    import pyarrow
    from datasets import Features

    cast = [schema.field(name) for name in columns.cast if pyarrow.types.is_integer(schema.field(name).type)]
    return class_labels(Features.from_arrow_schema(pyarrow.schema(cast, schema.metadata)))


def class_labels(features: Mapping[str, Any] | None) -> Labels:
    """Return the names of the values of each column that is a ClassLabel."""
    from datasets import ClassLabel

    return {name: kind.names for name, kind in (features or {}).items() if isinstance(kind, ClassLabel) and kind.names}


_READERS: dict[str, tuple[str, Callable[[IO[bytes], str, Columns | None], Table]]] = {
    ".jsonl": ("JSON", read_jsonl_table),
    ".ndjson": ("JSON", read_jsonl_table),
    ".json": ("JSON", read_json_table),
    ".csv": ("CSV", _csv),
    ".tsv": ("TSV", _tsv),
    ".parquet": ("Parquet", _parquet),
}
