"""Files, locally and in object storage, behind one small interface.

A URI is a local path, `gs://bucket/name`, or another one of `fsspec_store.PACKAGES` (`s3://`, `az://`, ...).
In object storage a "folder" is all names with the prefix `name/`. All functions raise `SkdError` where a place cannot
be read, written, listed or deleted, or where two processes write to one at the same time, and `Missing` where there is
nothing.
"""

from __future__ import annotations

import tempfile
import uuid
from contextlib import AbstractContextManager
from pathlib import Path
from types import ModuleType
from typing import IO, Protocol

from skd_lib._core.uris import shown
from skd_lib.errors import SkdError
from skd_lib.storage import fsspec_store, local
from skd_lib.storage.local import atomic_directory, atomic_file, sha256, write_text_atomic
from skd_lib.storage.objects import GCS, Missing, StoredObject, local_errors

__all__ = [
    "GCS",
    "Missing",
    "StoredObject",
    "atomic_directory",
    "atomic_file",
    "check_checkpoint_root",
    "check_kind",
    "check_writable",
    "checkpoint_folder",
    "create_object",
    "delete",
    "delete_object",
    "download",
    "exists",
    "file_sizes",
    "is_remote",
    "list_objects",
    "open_binary",
    "read_bytes",
    "sha256",
    "upload",
    "write_text_atomic",
]


def is_remote(uri: str) -> bool:
    """Tell whether `uri` is in object storage."""
    scheme = uri.partition("://")[0] if "://" in uri else ""
    return f"{scheme}://" == GCS or scheme in fsspec_store.PACKAGES


def check_kind(uri: str) -> None:
    """Check that `uri` is of a kind that can be read."""
    if "://" in uri and not is_remote(uri) and not Path(uri).exists():
        scheme = uri.partition("://")[0]
        hint = (
            f"give a local path, or a URI of object storage ({GCS}, s3://, az://): download the file there first; a "
            "dataset or a model of the Hugging Face hub has its id (org/name)"
        )
        raise SkdError(f"{scheme}:// URIs are not read", where=shown(uri), hint=hint)


def exists(uri: str) -> bool:
    """Tell whether there is a file, an object or a folder at `uri`."""
    return _store(uri).exists(uri)


def open_binary(uri: str) -> AbstractContextManager[IO[bytes]]:
    """Open a file or an object for reading; an object is fetched in ranges, as they are read, and can seek."""
    return _store(uri).open_binary(uri)


def read_bytes(uri: str) -> bytes:
    """Return the whole content of a file or an object; an object's checksum is verified."""
    return _store(uri).read_bytes(uri)


def download(uri: str, to: Path) -> Path:
    """Copy a file, an object or a folder to the local path `to`, which appears only when it is complete.

    Objects are verified against their checksum. What is at `to` already is replaced.
    """
    with local_errors(str(to), "write"):
        to.parent.mkdir(parents=True, exist_ok=True)
    _store(uri).download(uri, to)
    return to


def upload(path: Path, uri: str, *, last: str = "") -> None:
    """Copy a local file or folder to `uri`.

    Each file appears only when it is complete. A local folder appears as a whole, in place of one that is there. In
    object storage, where there are no folders, its objects appear one after the other; objects under `uri` that the
    folder does not have are left alone. The object of the file `last` appears after all others, and disappears before
    they change: a reader that finds it knows that all are there (of two uploads at the same moment, one of which
    fails, maybe files of both).
    """
    if not path.exists():
        raise SkdError("no such file or folder", where=str(path))
    _store(uri).upload(path, uri, last)


def list_objects(uri: str) -> list[StoredObject]:
    """List the file or object at `uri`, or else all that are in the folder `uri`, sorted by URI.

    Cost: local files are read in full, for their sha256.
    """
    return _store(uri).list_objects(uri)


def file_sizes(uri: str) -> dict[str, int]:
    """Return the bytes of each file or object in the folder `uri`, by its name in the folder; nothing is read."""
    return _store(uri).file_sizes(uri)


def delete(uri: str) -> None:
    """Delete the file, object or folder at `uri`; nothing happens where there is none."""
    _store(uri).delete(uri)


def create_object(uri: str, content: bytes, *, replacing: str = "0") -> str | None:
    """Write an object of Google Cloud Storage on a condition; see `skd_lib.storage.gcs.create_object`."""
    generation: str | None = _with_generations(uri).create_object(uri, content, replacing=replacing)
    return generation


def delete_object(uri: str, generation: str) -> None:
    """Delete a generation of an object of Google Cloud Storage; see `skd_lib.storage.gcs.delete_object`."""
    _with_generations(uri).delete_object(uri, generation)


def check_writable(uri: str) -> None:
    """Write a small file or object under the folder `uri`, and delete it again; a missing local folder is made."""
    _store(uri).check_writable(uri, f".skd-write-check-{uuid.uuid4().hex}")


def check_checkpoint_root(root: str) -> None:
    """Check that training can keep checkpoints there: in a folder, in object storage, or (empty) in temporary files."""
    if "://" in root and not is_remote(root):
        hint = "give a folder (a mounted volume outlives a pod) or a gs:// URI"
        raise SkdError("checkpoints cannot be kept there", where=f"checkpoint_root {root}", hint=hint)


def checkpoint_folder(root: str) -> Path:
    """Return the folder in which checkpoints are made: `root`, or a temporary folder where that is no folder."""
    return Path(root) if root and not is_remote(root) else Path(tempfile.gettempdir()) / "skd-checkpoints"


class _Store(Protocol):
    """The functions that each kind of storage has, as a module."""

    def exists(self, uri: str) -> bool: ...
    def open_binary(self, uri: str) -> AbstractContextManager[IO[bytes]]: ...
    def read_bytes(self, uri: str) -> bytes: ...
    def download(self, uri: str, to: Path) -> None: ...
    def upload(self, path: Path, uri: str, last: str) -> None: ...
    def list_objects(self, uri: str) -> list[StoredObject]: ...
    def file_sizes(self, uri: str) -> dict[str, int]: ...
    def delete(self, uri: str) -> None: ...
    def check_writable(self, uri: str, probe: str) -> None: ...


def _store(uri: str) -> _Store:
    check_kind(uri)
    if uri.startswith(GCS):
        return _gcs(uri)
    return fsspec_store if is_remote(uri) else local


def _with_generations(uri: str) -> ModuleType:
    if not uri.startswith(GCS):
        hint = "use a gs:// URI, or a local folder"
        raise SkdError("this storage cannot write an object on a condition", where=uri, hint=hint)
    return _gcs(uri)


def _gcs(uri: str) -> ModuleType:
    try:
        from skd_lib.storage import gcs
    except ImportError as error:
        hint = "pip install 'skd-lib[training]'"
        raise SkdError("gs:// needs the package google-cloud-storage", where=uri, hint=hint) from error
    return gcs
