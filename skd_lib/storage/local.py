"""Files of this machine."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO

from skd_lib.storage.objects import StoredObject, files_in, local_errors, missing


def exists(uri: str) -> bool:
    """Tell whether there is a file or a folder."""
    return Path(uri).exists()


@contextmanager
def open_binary(uri: str) -> Iterator[IO[bytes]]:
    """Open a file for reading."""
    with ExitStack() as stack:
        with local_errors(uri, "read"):
            file = stack.enter_context(Path(uri).open("rb"))
        yield file


def read_bytes(uri: str) -> bytes:
    """Return a file's content."""
    with local_errors(uri, "read"):
        return Path(uri).read_bytes()


def download(uri: str, to: Path) -> None:
    """Copy a file or a folder."""
    if not Path(uri).exists():
        raise missing(uri)
    with local_errors(uri, f"copy to {to}"):
        copy(Path(uri), to)


def upload(path: Path, uri: str, last: str) -> None:
    """Copy a file or a folder, which appears as a whole, `last` with the rest."""
    del last
    with local_errors(uri, "write"):
        Path(uri).parent.mkdir(parents=True, exist_ok=True)
        copy(path, Path(uri))


def list_objects(uri: str) -> list[StoredObject]:
    """List the file, or those in the folder, read in full for their sha256."""
    path = Path(uri)
    if not path.exists():
        raise missing(uri)
    found = [path] if path.is_file() else sorted(files_in(path))
    with local_errors(uri, "read"):
        return [
            StoredObject(str(file), status.st_size, "", f"sha256:{sha256(file)}", status.st_mtime)
            for file, status in ((file, file.stat()) for file in found)
        ]


def file_sizes(uri: str) -> dict[str, int]:
    """Return the bytes of each file in the folder, by its name in it."""
    path, sizes = Path(uri), {}
    with local_errors(uri, "read"):
        for folder, _, names in os.walk(path):
            for file in (Path(folder) / name for name in names):
                with suppress(FileNotFoundError):  # another process may be deleting files
                    sizes[file.relative_to(path).as_posix()] = file.stat().st_size
    return dict(sorted(sizes.items()))


def delete(uri: str) -> None:
    """Delete the file or the folder."""
    with local_errors(uri, "delete"):
        remove(Path(uri))


def check_writable(uri: str, probe: str) -> None:
    """Write a small file into the folder, which is made if it is missing, and delete it."""
    with local_errors(uri, "write into"):
        folder = Path(uri)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / probe).write_bytes(b"skd")
        (folder / probe).unlink()


def sha256(path: Path) -> str:
    """Return the hex sha256 of a local file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path next to `path`; its content replaces `path` if the block ends without an error.

    Raises:
        OSError: the folder is missing, full or not writable, or a device or pipe is there, which would be lost.
    """
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise FileExistsError(errno.EEXIST, "a device or pipe is there, no file", str(path))
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text_atomic(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old content or the new, never a part.

    Raises:
        OSError: the folder is missing, full or not writable.
    """
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Yield a temporary folder next to `path`, which becomes `path` if the block ends without an error.

    A folder that is at `path` already is moved aside first, since a folder cannot be renamed onto one with content:
    for a moment there is none. Of two processes that make the same folder at a time the last one wins.

    Raises:
        OSError: the parent folder is full or not writable.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    old = temporary.with_name(f"{temporary.name}.old")
    try:
        # mkdtemp makes private folders; the result is as readable as any other new folder.
        new = temporary / "new"
        new.mkdir()
        yield new
        _swap_in(new, path, old)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        remove(old)


def _swap_in(new: Path, path: Path, old: Path) -> None:
    while True:
        try:
            with suppress(FileNotFoundError):
                path.replace(old)
            new.replace(path)
        except BaseException as error:
            # Another process put its own folder there in between: move that one aside too.
            if isinstance(error, OSError) and error.errno in {errno.ENOTEMPTY, errno.EEXIST}:
                remove(old)
                continue
            with suppress(OSError):
                old.replace(path)
            raise
        return


def copy(source: Path, to: Path) -> None:
    """Copy a file or a folder, which appears when it is complete."""
    if source.is_dir():
        with atomic_directory(to) as folder:
            shutil.copytree(source, folder, dirs_exist_ok=True)
    else:
        with atomic_file(to) as temporary:
            shutil.copyfile(source, temporary)


def remove(path: Path) -> None:
    """Remove a file or a folder, if there is one."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
