"""Files, locally and in object storage, behind one small interface.

A URI is a local path, `gs://bucket/name`, or another one of `fsspec_store.PACKAGES` (`s3://`, `az://`, ...).
In object storage a "folder" is what all names with the prefix `name/` make up.
"""

from __future__ import annotations

import tempfile
import uuid
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO, Protocol

from skd_lib._core.uris import shown
from skd_lib.errors import SkdError
from skd_lib.storage import fsspec_store, gcs, local
from skd_lib.storage.errors import Missing, local_errors
from skd_lib.storage.local import atomic_directory, atomic_file, sha256, write_text_atomic
from skd_lib.storage.objects import StoredObject

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

GCS = gcs.SCHEME


def is_remote(uri: str) -> bool:
    """Whether `uri` is in object storage."""
    return _kind(uri) is not local


def check_kind(uri: str) -> None:
    """See that `uri` is of a kind that is read.

    Raises:
        SkdError: it is not, e.g. https://.
    """
    if "://" in uri and not is_remote(uri) and not Path(uri).exists():
        scheme = uri.partition("://")[0]
        hint = (
            f"give a local path, or a URI of object storage ({GCS}, s3://, az://): download the file there first; a "
            "dataset or a model of the Hugging Face hub has its id (org/name)"
        )
        raise SkdError(f"{scheme}:// URIs are not read", where=shown(uri), hint=hint)


def exists(uri: str) -> bool:
    """Whether there is a file, an object or a folder at `uri`.

    Raises:
        SkdError: the bucket cannot be asked.
    """
    return _store(uri).exists(uri)


def open_binary(uri: str) -> AbstractContextManager[IO[bytes]]:
    """Open a file or an object for reading; an object is fetched in ranges, as they are read, and can seek.

    Raises:
        SkdError: there is none, or it cannot be read.
    """
    return _store(uri).open_binary(uri)


def read_bytes(uri: str) -> bytes:
    """The whole content of a file or an object; an object's checksum is verified.

    Raises:
        SkdError: there is none, or it cannot be read.
    """
    return _store(uri).read_bytes(uri)


def download(uri: str, to: Path) -> Path:
    """Copy a file, an object or a folder to the local path `to`, which appears only when it is complete.

    Objects are verified against their checksum. What is at `to` already is replaced.

    Raises:
        SkdError: there is nothing at `uri`, or it cannot be read, or `to` cannot be written.
    """
    with local_errors(str(to), "write"):
        to.parent.mkdir(parents=True, exist_ok=True)
    _store(uri).download(uri, to)
    return to


def upload(path: Path, uri: str, *, last: str = "") -> None:
    """Copy a local file or folder to `uri`.

    Each file appears only when it is complete. A local folder appears as a whole, in place of one that is there. In
    object storage, where there are no folders, no object of one appears before all of them have arrived, but then they
    appear one after the other; objects under `uri` that the folder does not have are left alone.

    Args:
        path: The file or folder.
        uri: Where it will be.
        last: A file of the folder whose object appears after all others, and disappears before they change: who sees it
            knows that all are there (of two uploads at the same moment, one of which fails, maybe files of both).

    Raises:
        SkdError: there is nothing at `path`, `uri` cannot be written, or somebody else wrote there in the meantime.
    """
    if not path.exists():
        raise SkdError("no such file or folder", where=str(path))
    _store(uri).upload(path, uri, last)


def list_objects(uri: str) -> list[StoredObject]:
    """The file or object at `uri`, or else all that are in the folder `uri`, sorted by URI.

    Cost: local files are read in full, for their sha256.

    Raises:
        SkdError: there is nothing at `uri`, or it cannot be listed.
    """
    return _store(uri).list_objects(uri)


def file_sizes(uri: str) -> dict[str, int]:
    """Bytes of each file or object in the folder `uri`, by its name relative to the folder; nothing is read.

    Raises:
        SkdError: it cannot be listed.
    """
    return _store(uri).file_sizes(uri)


def delete(uri: str) -> None:
    """Delete the file, object or folder at `uri`; nothing happens where there is none.

    Raises:
        SkdError: it cannot be deleted.
    """
    _store(uri).delete(uri)


def create_object(uri: str, content: bytes, *, replacing: str = "0") -> str | None:
    """Write an object of Google Cloud Storage on a condition; see `skd_lib.storage.gcs.create_object`.

    Raises:
        SkdError: it cannot be written, or is in other storage, which has no generations.
    """
    _needs_generations(uri)
    return gcs.create_object(uri, content, replacing=replacing)


def delete_object(uri: str, generation: str) -> None:
    """Delete a generation of an object of Google Cloud Storage; see `skd_lib.storage.gcs.delete_object`.

    Raises:
        SkdError: it cannot be deleted, or is in other storage.
    """
    _needs_generations(uri)
    gcs.delete_object(uri, generation)


def check_writable(uri: str) -> None:
    """Write a small file or object under the folder `uri`, and delete it again; a missing local folder is made.

    Raises:
        SkdError: it cannot be written, saying why.
    """
    _store(uri).check_writable(uri, f".skd-write-check-{uuid.uuid4().hex}")


def check_checkpoint_root(root: str) -> None:
    """See that training can keep checkpoints there: in a folder, in object storage, or (empty) in temporary files.

    Raises:
        SkdError: `root` is a URI of another kind of storage.
    """
    if "://" in root and not is_remote(root):
        hint = "give a folder (a mounted volume outlives a pod) or a gs:// URI"
        raise SkdError("checkpoints cannot be kept there", where=f"checkpoint_root {root}", hint=hint)


def checkpoint_folder(root: str) -> Path:
    """The folder in which checkpoints are made: `root`, or one among the temporary files where that is no folder."""
    return Path(root) if root and not is_remote(root) else Path(tempfile.gettempdir()) / "skd-checkpoints"


def _needs_generations(uri: str) -> None:
    if _store(uri) is not gcs:
        hint = "use a gs:// URI, or a local folder"
        raise SkdError("this storage cannot write an object on a condition", where=uri, hint=hint)


class _Store(Protocol):
    """What each kind of storage has, as a module."""

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
    return _kind(uri)


def _kind(uri: str) -> _Store:
    scheme = uri.partition("://")[0] if "://" in uri else ""
    if f"{scheme}://" == GCS:
        return gcs
    return fsspec_store if scheme in fsspec_store.PACKAGES else local
