"""Reading and checking the rows of JSONL, CSV and Parquet files, with the row number in every error."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import IO, Any

from skd_lib.config import Columns
from skd_lib.data.examples import Example, make_example
from skd_lib.errors import SkdError, SkdErrors

MAX_PROBLEMS = 20
_HINT_BROKEN = "mend or remove this row"
_PLACE = re.compile(r"{([^{}]+)}")


class Problems:
    """Collects what is wrong with the rows, and stops reading once there is enough to mend."""

    def __init__(self, limit: int = MAX_PROBLEMS) -> None:
        self._errors: list[SkdError] = []
        self._limit = limit

    def add(self, error: SkdError) -> None:
        """Note an error.

        Raises:
            SkdErrors: there are as many as the limit now.
        """
        self._errors.append(error)
        if len(self._errors) >= self._limit:
            more = SkdError(f"reading stopped after {len(self._errors)} problems; there may be more")
            raise SkdErrors([*self._errors, more])

    def raise_any(self) -> None:
        """Raise `SkdErrors` if anything was noted."""
        if self._errors:
            raise SkdErrors(self._errors)


def read_file(
    stream: IO[bytes], name: str, columns: Columns, problems: Problems, max_rows: int | None = None
) -> list[Example]:
    """Read the examples of one file; rows that are wrong go to `problems`.

    Args:
        stream: The file's content; Parquet needs a stream that can seek.
        name: Path or URI; its ending says which format it is.
        columns: Names of the source's and the target's columns.
        problems: Where errors are noted, with file, row and field. Rows are counted from 1; a CSV header is no row.
        max_rows: Read at most this many.

    Raises:
        SkdErrors: there are too many problems to go on.
    """
    reader = next((reader for ending, reader in _READERS.items() if name.lower().endswith(ending)), None)
    if reader is None:
        hint = f"use one of: {', '.join(_READERS)}"
        problems.add(SkdError("unknown kind of data file", where=name, hint=hint))
        return []
    return check_rows(islice(reader(stream, name, columns, problems), max_rows), columns, problems)


def check_rows(rows: Iterable[tuple[str, dict[str, Any]]], columns: Columns, problems: Problems) -> list[Example]:
    """Turn rows into examples: both columns must be there, and be text that is not blank.

    Args:
        rows: Where each row is, and its fields.
        columns: Names of the source's and the target's columns.
        problems: Where errors are noted.
    """
    examples = []
    for where, row in rows:
        errors = [error for name in _names(columns) if (error := _field_error(row, name, where))]
        for error in errors:
            problems.add(error)
        if not errors:
            examples.append(make_example(_text(row, columns.source), _text(row, columns.target), origin=where))
    return examples


def _names(columns: Columns) -> list[str]:
    """All columns that are read."""
    return [name for column in (columns.source, columns.target) for name in _PLACE.findall(column) or [column]]


def _text(row: dict[str, Any], column: str) -> str:
    """The field of a column, or a template filled with several."""
    return _PLACE.sub(lambda place: str(row[place[1]]), column) if _PLACE.search(column) else str(row[column])


def _field_error(row: dict[str, Any], column: str, where: str) -> SkdError | None:
    place = f"{where}, field `{column}`"
    if column not in row:
        hint = f"this row has: {', '.join(row) or 'nothing'}; name the columns in `data.source.columns`"
        return SkdError("the field is missing", where=place, hint=hint)
    value = row[column]
    if not isinstance(value, str):
        return SkdError(f"must be text, got {type(value).__name__} {_short(value)}", where=place, hint=_HINT_BROKEN)
    if not value.strip():
        return SkdError("the text is empty", where=place, hint=_HINT_BROKEN)
    try:
        value.encode()
    except UnicodeEncodeError as error:
        what = f"half a surrogate pair, \\u{ord(value[error.start]):x} at character {error.start}, is no text"
        return SkdError(what, where=place, hint=_HINT_BROKEN)
    return None


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _jsonl(stream: IO[bytes], name: str, _columns: Columns, problems: Problems) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(stream, start=1):
        where = f"{name}, row {number}"
        if not line.strip():
            continue
        try:
            row = json.loads(line.rstrip().decode("utf-8-sig" if number == 1 else "utf-8"))
        except UnicodeDecodeError as error:
            problems.add(SkdError(f"not UTF-8 text: {error}", where=where, hint="convert the file to UTF-8"))
        except json.JSONDecodeError as error:
            problems.add(SkdError(f"broken JSON: {error.msg} (column {error.colno})", where=where, hint=_HINT_BROKEN))
        else:
            if isinstance(row, dict):
                yield where, row
            else:
                what = f"must be a JSON object, got {type(row).__name__} {_short(row)}"
                problems.add(SkdError(what, where=where, hint='write {"source": "...", "target": "..."}'))


def _csv(
    stream: IO[bytes], name: str, columns: Columns, problems: Problems, delimiter: str = ","
) -> Iterator[tuple[str, dict[str, Any]]]:
    reader = csv.DictReader(
        io.TextIOWrapper(stream, encoding="utf-8-sig", newline=""), delimiter=delimiter, strict=True
    )
    row = 0
    try:
        if not has_columns(reader.fieldnames or (), name, columns, problems):
            return
        for row, values in enumerate(reader, start=1):
            where = f"{name}, row {row} (line {reader.line_num})"
            # DictReader puts surplus fields under None, and None where fields are missing.
            if None in values or None in values.values():
                hint = f"the header has {len(reader.fieldnames or ())} fields; quote a field that holds the delimiter"
                problems.add(SkdError("the number of fields differs from the header's", where=where, hint=hint))
            else:
                yield where, values
    except csv.Error as error:
        problems.add(SkdError(f"broken CSV: {error}", where=f"{name}, row {row + 1}", hint=_HINT_BROKEN))
    except UnicodeDecodeError as error:
        where = f"{name}, after row {row}"
        problems.add(SkdError(f"not UTF-8 text: {error}", where=where, hint="convert the file to UTF-8"))


def _tsv(stream: IO[bytes], name: str, columns: Columns, problems: Problems) -> Iterator[tuple[str, dict[str, Any]]]:
    return _csv(stream, name, columns, problems, delimiter="\t")


def _parquet(
    stream: IO[bytes], name: str, columns: Columns, problems: Problems
) -> Iterator[tuple[str, dict[str, Any]]]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(stream)
        if not has_columns(file.schema_arrow.names, name, columns, problems):
            return
        number = 0
        for batch in file.iter_batches(columns=_names(columns)):
            for values in batch.to_pylist():
                number += 1
                yield f"{name}, row {number}", values
    except pyarrow.ArrowException as error:
        problems.add(SkdError(f"not a Parquet file: {error}", where=name, hint="check the file, or write it again"))


def has_columns(names: Iterable[str], file: str, columns: Columns, problems: Problems) -> bool:
    """Whether a table has the columns; a missing one is noted in `problems` once, not once a row."""
    names = list(names)
    missing = [column for column in _names(columns) if column not in names]
    hint = f"this file has: {', '.join(names) or 'nothing'}; name the columns in `data.source.columns`"
    for column in missing:
        problems.add(SkdError("the column is missing", where=f"{file}, field `{column}`", hint=hint))
    return not missing


_Reader = Callable[[IO[bytes], str, Columns, Problems], Iterator[tuple[str, dict[str, Any]]]]
_READERS: dict[str, _Reader] = {
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".csv": _csv,
    ".tsv": _tsv,
    ".parquet": _parquet,
}
