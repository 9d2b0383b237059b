"""Columns by the names that they usually have, where a configuration names none."""

from __future__ import annotations

from skd_lib import storage
from skd_lib.config import Columns, FilesSource
from skd_lib.data.files import data_files
from skd_lib.data.readers import read_file
from skd_lib.data.rows import Problems
from skd_lib.errors import SkdError

USUAL = (
    ("source", "target"),
    ("prompt", "completion"),
    ("prompt", "response"),
    ("question", "answer"),
    ("instruction", "output"),
    ("input", "output"),
    ("document", "summary"),
    ("article", "summary"),
    ("text", "summary"),
)
"""Names of the input's and the answer's column."""


def find_columns(source: FilesSource) -> Columns:
    """Return the columns to read: those named, else the first of `USUAL` that the first row of the training data has.

    Where there are none, the default: who reads the data says which columns there are.
    """
    if source.columns != Columns():
        return source.columns
    for names in USUAL:
        columns = Columns(source=names[0], target=names[1])
        try:
            file = next(iter(data_files(source.train[0])))
            problems = Problems()
            with storage.open_binary(file) as stream:
                found = read_file(stream, file, columns, problems, 1)
            problems.raise_any()
        except (SkdError, StopIteration):
            continue
        if found:
            return columns
    return source.columns
