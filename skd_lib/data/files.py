"""Files of a path, a folder or a glob: always in the same order, and regular files only."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

from skd_lib import storage
from skd_lib.errors import SkdError
from skd_lib.storage import Missing, StoredObject

ENDINGS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
COMPRESSED = ".gz"
_WILD = re.compile(r"[*?\[]")


def ending(name: str) -> str | None:
    """Return the ending that names a data file's format, without `.gz`; None if it is no data file."""
    name = name.lower()
    found = Path(name.removesuffix(COMPRESSED)).suffix
    return found if found in ENDINGS and not (found == ".parquet" and name.endswith(COMPRESSED)) else None


def data_files(uri: str) -> list[str]:
    """Return the files of a URI, sorted by name: itself, those in a folder, or those that match a glob.

    In a folder and its subfolders, all files with the ending of a data file count, except those whose name, or whose
    folder's, begins with `.` or `_`, as Spark's and editors' do. In a glob `**` stands for any number of folders. A
    file whose own name has a `*`, `?` or `[` is that file.

    Raises:
        Missing: there is nothing.
        SkdError: it cannot be read, is no regular file, or a folder without data files.
    """
    storage.check_kind(uri)
    if storage.is_remote(uri):
        return _remote(uri)
    try:
        return [_regular(uri)]
    except IsADirectoryError:
        path = Path(uri)
        return _some(sorted(_regular(str(path / name)) for name in _walk(path) if _is_data(name)), uri)
    except Missing:
        if not _WILD.search(uri):
            raise
        return _some(_local_glob(uri), uri)


def stored_files(uri: str) -> list[StoredObject]:
    """Return `data_files` with what identifies their content. Cost: local files are read in full, for their sha256."""
    files = data_files(uri)
    if not storage.is_remote(uri) or files == [uri]:
        return [stored for file in files for stored in storage.list_objects(file)]
    listed = {stored.uri: stored for stored in storage.list_objects(_fixed_part(uri))}
    try:
        return [listed[file] for file in files]
    except KeyError as error:
        raise Missing("it was deleted a moment ago", where=str(error.args[0]), hint="try again") from error


def is_there(uri: str) -> bool:
    """Return whether `data_files` finds any, and raise its other errors."""
    try:
        return bool(data_files(uri))
    except Missing:
        return False


def _remote(uri: str) -> list[str]:
    try:
        objects = [stored.uri for stored in storage.list_objects(uri)]
    except Missing:
        if not _WILD.search(uri):
            raise
        folder = _fixed_part(uri)
        pattern = uri.removeprefix(f"{folder}/").split("/")
        names = sorted(storage.file_sizes(folder))
        return _some([f"{folder}/{name}" for name in names if _matches(name.split("/"), pattern)], uri)
    folder = uri.rstrip("/")
    if objects == [folder]:
        return objects
    return _some([name for name in objects if _is_data(name.removeprefix(f"{folder}/"))], uri)


def _fixed_part(uri: str) -> str:
    """Return the folder above the first part of a glob that has a wildcard; the URI itself if none has."""
    scheme, _, rest = uri.rpartition("://")
    parts = rest.rstrip("/").split("/")
    fixed = next((parts[:number] for number, part in enumerate(parts) if _WILD.search(part)), parts)
    return f"{scheme}://{'/'.join(fixed)}" if scheme else "/".join(fixed)


def _matches(name: list[str], pattern: list[str]) -> bool:
    if not name or not pattern:
        return not name and all(part == "**" for part in pattern)
    hidden = name[0].startswith(".")
    if pattern[0] == "**":
        return _matches(name, pattern[1:]) or (not hidden and _matches(name[1:], pattern))
    if hidden and not pattern[0].startswith("."):
        return False
    return fnmatchcase(name[0], pattern[0]) and _matches(name[1:], pattern[1:])


def _local_glob(pattern: str) -> list[str]:
    fixed = _fixed_part(pattern)
    folder = Path(fixed or ("/" if pattern.startswith("/") else "."))
    parts = pattern.removeprefix(fixed).lstrip("/").split("/")
    names = _walk(folder, None if "**" in parts else len(parts)) if folder.is_dir() else iter(())
    return sorted(_regular(str(folder / name)) for name in names if _matches(name.split("/"), parts))


def _walk(folder: Path, depth: int | None = None) -> Iterator[str]:
    """Yield the files below a folder, by their path in it, down to a depth."""

    def refuse(error: OSError) -> None:
        raise _unreadable(str(error.filename), error) from error

    for root, folders, names in os.walk(folder, onerror=refuse):
        below = os.path.relpath(root, folder)
        prefix = "" if below == "." else f"{below}/"
        if depth is not None and prefix.count("/") + 1 >= depth:
            folders.clear()
        yield from (f"{prefix}{name}" for name in names)


def _is_data(name: str) -> bool:
    return ending(name) is not None and not any(part.startswith((".", "_")) for part in name.split("/"))


def _regular(path: str) -> str:
    """Return the path of a regular file: reading a pipe or a device could wait for ever.

    Raises:
        IsADirectoryError: it is a folder.
        Missing: there is none.
        SkdError: it is of another kind.
    """
    try:
        mode = Path(path).stat().st_mode
    except FileNotFoundError as error:
        raise Missing(f"cannot read: {error.strerror}", where=path, hint="check the path") from error
    except OSError as error:
        raise _unreadable(path, error) from error
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(path)
    if not stat.S_ISREG(mode):
        hint = "give a regular file; write what comes through a pipe into one first"
        raise SkdError("not a regular file", where=path, hint=hint)
    return path


def _some(files: list[str], uri: str) -> list[str]:
    if not files:
        kinds = f"{', '.join(ENDINGS)}, or .gz of all but Parquet"
        raise Missing("there is no data file here", where=uri, hint=f"check the path; data files end with {kinds}")
    return files


def _unreadable(where: str, error: OSError) -> SkdError:
    hint = "check the path and its permissions"
    return SkdError(f"cannot read: {error.strerror or error}", where=where, hint=hint)
