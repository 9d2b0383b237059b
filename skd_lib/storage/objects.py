"""Stored objects, their names and paths, and the errors that all kinds of storage share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from skd_lib.errors import SkdError

GCS = "gs://"
TEMPORARY = ".skd-upload"
"""End of the names under which objects wait until they are complete; listings leave them out."""


class Missing(SkdError):
    """There is no such file, object, folder or bucket."""


def missing(uri: str) -> Missing:
    """Return the error that there is nothing at `uri`."""
    return Missing("no such file or folder", where=uri, hint="check the path")


@contextmanager
def local_errors(where: str, action: str) -> Iterator[None]:
    """Turn the operating system's errors into sentences."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        kind = Missing if isinstance(error, FileNotFoundError) else SkdError
        raise kind(f"cannot {action}: {reason}", where=where, hint="check the path and its permissions") from error


@dataclass(frozen=True)
class StoredObject:
    """A file or object, with what identifies its content.

    Attributes:
        uri: Its path or URI.
        size: Bytes.
        generation: The object's generation in Google Cloud Storage; empty for local files and other storage.
        checksum: `sha256:HEX` of a local file, `crc32c:BASE64` of an object in Google Cloud Storage, `etag:TEXT` or
            another token of what it is in other storage.
        modified: When it was last written, in seconds since 1970.
    """

    uri: str
    size: int
    generation: str
    checksum: str
    modified: float


def join(folder: str, name: str) -> str:
    """Join a folder and a name in it; the empty folder is the bucket itself."""
    return f"{folder}/{name}" if folder else name


def relative(name: str, folder: str) -> PurePosixPath:
    """Return an object's name as a path below its folder."""
    path = PurePosixPath(name.removeprefix(f"{folder}/") if folder else name)
    if path.is_absolute() or ".." in path.parts:
        raise SkdError(f"the object {name!r} would be written outside the folder", hint="rename the object")
    return path


def files_in(folder: Path) -> Iterator[Path]:
    """Return all files of a folder and of those in it."""
    return (file for file in folder.rglob("*") if file.is_file())


def files_by_target(path: Path, target: str) -> dict[str, Path]:
    """Return the file, or all files of the folder, by the object names that they get in or at `target`."""
    if path.is_file():
        return {target: path}
    return {join(target, file.relative_to(path).as_posix()): file for file in sorted(files_in(path))}
