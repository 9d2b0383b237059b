"""Files, locally and in object storage, behind one small interface.

A URI is a local path or `gs://bucket/name`. In object storage a "folder" is what all names with the prefix
`name/` make up. Credentials are Google's application default credentials; with `STORAGE_EMULATOR_HOST` set, the
emulator at that address is used without credentials.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

from skd_lib.errors import SkdError

GCS = "gs://"


class Missing(SkdError):
    """There is no such file, object, folder or bucket."""


@dataclass(frozen=True)
class StoredObject:
    """One file or object, and what tells its content from any other's.

    Attributes:
        uri: Its path or gs:// URI.
        size: Bytes.
        generation: The object's generation in Google Cloud Storage; empty for local files.
        checksum: `sha256:HEX` of a local file, `crc32c:BASE64` of an object.
        modified: When it was last written, in seconds since 1970.
    """

    uri: str
    size: int
    generation: str
    checksum: str
    modified: float


def is_remote(uri: str) -> bool:
    """Whether `uri` is in object storage."""
    return uri.startswith(GCS)


def exists(uri: str) -> bool:
    """Whether there is a file, an object or a folder at `uri`.

    Raises:
        SkdError: the bucket cannot be asked.
    """
    if not is_remote(uri):
        return Path(uri).exists()
    bucket, name = _split(uri)
    with _cloud_errors(uri):
        return _client().bucket(bucket).blob(name).exists() or any(_blobs(bucket, name, limit=1))


@contextmanager
def open_binary(uri: str) -> Iterator[IO[bytes]]:
    """Open a file or an object for reading; an object is fetched in ranges, as they are read, and can seek.

    Raises:
        SkdError: there is none, or it cannot be read.
    """
    if not is_remote(uri):
        with ExitStack() as stack:
            with _local_errors(uri, "read"):
                file = stack.enter_context(Path(uri).open("rb"))
            yield file
        return
    bucket, name = _split(uri)
    with _cloud_errors(uri):
        blob = _client().bucket(bucket).get_blob(name)
        if blob is None:
            raise _missing(uri)
        # Ranges of one generation: an object that is overwritten while it is read must fail, not mix.
        with _client().bucket(bucket).blob(name, generation=blob.generation).open("rb") as stream:
            yield stream


def read_bytes(uri: str) -> bytes:
    """The whole content of a file or an object; an object's checksum is verified.

    Raises:
        SkdError: there is none, or it cannot be read.
    """
    if not is_remote(uri):
        with _local_errors(uri, "read"):
            return Path(uri).read_bytes()
    bucket, name = _split(uri)
    with _cloud_errors(uri):
        content: bytes = _client().bucket(bucket).blob(name).download_as_bytes(checksum="crc32c")
        return content


def download(uri: str, to: Path) -> Path:
    """Copy a file, an object or a folder to the local path `to`, which appears only when it is complete.

    Objects are verified against their crc32c checksum. What is at `to` already is replaced.

    Raises:
        SkdError: there is nothing at `uri`, or it cannot be read, or `to` cannot be written.
    """
    with _local_errors(str(to), "write"):
        to.parent.mkdir(parents=True, exist_ok=True)
    if not is_remote(uri):
        if not Path(uri).exists():
            raise _missing(uri)
        with _local_errors(uri, f"copy to {to}"):
            _copy_local(Path(uri), to)
        return to
    bucket, name = _split(uri)
    with _local_errors(str(to), "write"), _cloud_errors(uri):
        if name and _client().bucket(bucket).blob(name).exists():
            with atomic_file(to) as temporary:
                _client().bucket(bucket).blob(name).download_to_filename(str(temporary), checksum="crc32c")
            return to
        blobs = list(_blobs(bucket, name))
        if not blobs:
            raise _missing(uri)
        with atomic_directory(to) as folder:
            for blob in blobs:
                target = folder / _relative(blob.name, name)
                target.parent.mkdir(parents=True, exist_ok=True)
                blob.download_to_filename(str(target), checksum="crc32c")
    return to


def upload(path: Path, uri: str, *, last: str = "") -> None:
    """Copy a local file or folder to `uri`.

    Each file appears only when it is complete. A folder's objects appear one after the other, in the order of
    their names; objects under `uri` that the folder does not have are left alone.

    Args:
        path: The file or folder.
        uri: Where it will be.
        last: A file of the folder whose object appears after all others: who sees it knows that all are there.

    Raises:
        SkdError: there is nothing at `path`, or `uri` cannot be written.
    """
    if not path.exists():
        raise SkdError("no such file or folder", where=str(path))
    if not is_remote(uri):
        with _local_errors(uri, "write"):
            Path(uri).parent.mkdir(parents=True, exist_ok=True)
            _copy_local(path, Path(uri))
        return
    bucket, name = _split(uri)
    files = [path] if path.is_file() else sorted(_files(path), key=lambda file: (file == path / last, file))
    with _cloud_errors(uri):
        for file in files:
            target = name if path.is_file() else _join(name, file.relative_to(path).as_posix())
            _client().bucket(bucket).blob(target).upload_from_filename(str(file), checksum="crc32c")


def list_objects(uri: str) -> list[StoredObject]:
    """The file or object at `uri`, or else all that are in the folder `uri`, sorted by URI.

    Cost: local files are read in full, for their sha256.

    Raises:
        SkdError: there is nothing at `uri`, or it cannot be listed.
    """
    if not is_remote(uri):
        path = Path(uri)
        if not path.exists():
            raise _missing(uri)
        files = [path] if path.is_file() else sorted(_files(path))
        with _local_errors(uri, "read"):
            return [_stored_file(file) for file in files]
    bucket, name = _split(uri)
    with _cloud_errors(uri):
        blob = _client().bucket(bucket).get_blob(name) if name else None
        blobs = [blob] if blob is not None else sorted(_blobs(bucket, name), key=lambda blob: str(blob.name))
        if not blobs:
            raise _missing(uri)
        return [_stored_blob(bucket, blob) for blob in blobs]


def file_sizes(uri: str) -> dict[str, int]:
    """Bytes of each file or object in the folder `uri`, by its name relative to the folder; nothing is read.

    Raises:
        SkdError: it cannot be listed.
    """
    if not is_remote(uri):
        path = Path(uri)
        with _local_errors(uri, "read"):
            return {file.relative_to(path).as_posix(): file.stat().st_size for file in sorted(_files(path))}
    bucket, name = _split(uri)
    with _cloud_errors(uri):
        return {str(_relative(blob.name, name)): int(blob.size) for blob in _blobs(bucket, name)}


def create_object(uri: str, content: bytes, *, replacing: str = "0") -> str | None:
    """Write the object at `uri` only if it is still in the generation `replacing`; "0": only if there is none.

    Of several who do this at a time one succeeds. Where its answer gets lost and the request is repeated, the writer
    itself may be told that it lost: `content` has to tell.

    Returns:
        The new generation; None if the object is in another one.

    Raises:
        SkdError: it cannot be written.
    """
    from google.api_core.exceptions import PreconditionFailed

    bucket, name = _split(uri)
    with _cloud_errors(uri):
        blob = _client().bucket(bucket).blob(name)
        try:
            blob.upload_from_string(content, if_generation_match=int(replacing))
        except PreconditionFailed:
            return None
        return str(blob.generation)


def delete_object(uri: str, generation: str) -> None:
    """Delete the object at `uri` if it is still in this generation; nothing happens where it is not.

    Raises:
        SkdError: it cannot be deleted.
    """
    from google.api_core.exceptions import NotFound, PreconditionFailed

    bucket, name = _split(uri)
    with _cloud_errors(uri), suppress(NotFound, PreconditionFailed):
        _client().bucket(bucket).blob(name).delete(if_generation_match=int(generation))


def delete(uri: str) -> None:
    """Delete the file, object or folder at `uri`; nothing happens where there is none.

    Raises:
        SkdError: it cannot be deleted.
    """
    if not is_remote(uri):
        with _local_errors(uri, "delete"):
            _remove(Path(uri))
        return
    bucket, name = _split(uri)
    if not name:
        raise SkdError("a whole bucket is not deleted", where=uri, hint="name a folder in it")
    with _cloud_errors(uri):
        blobs = [_client().bucket(bucket).blob(name), *_blobs(bucket, name)]
        _client().bucket(bucket).delete_blobs(blobs, on_error=lambda _blob: None)  # each was there or is gone


def check_writable(uri: str) -> None:
    """Write a small file or object under the folder `uri`, and delete it again; a missing local folder is made.

    Raises:
        SkdError: it cannot be written, saying why.
    """
    probe = f".skd-write-check-{uuid.uuid4().hex}"
    if not is_remote(uri):
        with _local_errors(uri, "write into"):
            folder = Path(uri)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / probe).write_bytes(b"skd")
            (folder / probe).unlink()
        return
    bucket, name = _split(uri)
    with _cloud_errors(uri):
        blob = _client().bucket(bucket).blob(_join(name, probe))
        blob.upload_from_string(b"skd")
        blob.delete()


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


def sha256(path: Path) -> str:
    """Hex sha256 of a local file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`; what is written there replaces `path` if the block ends without an error.

    Raises:
        OSError: the folder is missing, full or not writable.
    """
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
    """A temporary folder beside `path`, which becomes `path` if the block ends without an error.

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
        _remove(old)


def _swap_in(new: Path, path: Path, old: Path) -> None:
    while True:
        with suppress(FileNotFoundError):
            path.replace(old)
        try:
            new.replace(path)
        except OSError as error:
            # Another process put its own folder there in between: move that one aside too.
            if error.errno not in {errno.ENOTEMPTY, errno.EEXIST}:
                raise
            _remove(old)
        else:
            return


def _stored_file(file: Path) -> StoredObject:
    status = file.stat()
    return StoredObject(str(file), status.st_size, "", f"sha256:{sha256(file)}", status.st_mtime)


def _stored_blob(bucket: str, blob: Any) -> StoredObject:
    uri, checksum = f"{GCS}{bucket}/{blob.name}", f"crc32c:{blob.crc32c}"
    return StoredObject(uri, int(blob.size), str(blob.generation), checksum, blob.updated.timestamp())


def _copy_local(source: Path, to: Path) -> None:
    if source.is_dir():
        with atomic_directory(to) as folder:
            shutil.copytree(source, folder, dirs_exist_ok=True)
    else:
        with atomic_file(to) as temporary:
            shutil.copyfile(source, temporary)


def _files(folder: Path) -> Iterator[Path]:
    return (file for file in folder.rglob("*") if file.is_file())


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


# --- Google Cloud Storage -----------------------------------------------------------------------------------------


def _client() -> Any:
    return _client_for(os.environ.get("STORAGE_EMULATOR_HOST", ""), os.getpid())


@functools.lru_cache(maxsize=4)
def _client_for(_emulator: str, _process: int) -> Any:
    """One client, hence one token and one connection pool, a process and an emulator."""
    from google.cloud import storage

    # No project: reading and writing objects needs none, and outside Google Cloud there is none to find.
    return storage.Client(project=None)


def _split(uri: str) -> tuple[str, str]:
    bucket, _, name = uri.removeprefix(GCS).partition("/")
    if not bucket:
        raise SkdError("the URI names no bucket", where=uri, hint="write gs://BUCKET/NAME")
    return bucket, name.strip("/")


def _join(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name


def _blobs(bucket: str, folder: str, limit: int | None = None) -> Iterator[Any]:
    """The objects in a folder, without the empty objects `folder/` by which consoles show empty folders."""
    for blob in _client().list_blobs(bucket, prefix=f"{folder}/" if folder else None, max_results=limit):
        if not blob.name.endswith("/"):
            yield blob


def _relative(name: str, folder: str) -> PurePosixPath:
    relative = PurePosixPath(name.removeprefix(f"{folder}/") if folder else name)
    if relative.is_absolute() or ".." in relative.parts:
        raise SkdError(f"the object {name!r} would be written outside the folder", hint="rename the object")
    return relative


def _missing(uri: str) -> Missing:
    return Missing("no such file or folder", where=uri, hint="check the path")


@contextmanager
def _local_errors(where: str, action: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise SkdError(f"cannot {action}: {reason}", where=where, hint="check the path and its permissions") from error


@contextmanager
def _cloud_errors(uri: str) -> Iterator[None]:
    """Turn what the client library raises into sentences."""
    try:
        from google.api_core import exceptions as api
        from google.auth import exceptions as auth
        from google.cloud.storage.exceptions import DataCorruption
        from requests.exceptions import RequestException  # type: ignore[import-untyped, unused-ignore]
    except ImportError as error:
        hint = "pip install 'skd-lib[training]'"
        raise SkdError("gs:// needs the package google-cloud-storage", where=uri, hint=hint) from error
    try:
        yield
    except api.NotFound as error:
        raise Missing("no such bucket or object", where=uri, hint="check the URI") from error
    except (api.Forbidden, api.Unauthorized) as error:
        hint = "grant this account roles/storage.objectUser on the bucket"
        raise SkdError(f"access denied: {error.message}", where=uri, hint=hint) from error
    except DataCorruption as error:
        raise SkdError(f"the transfer was corrupted: {error}", where=uri, hint="try again") from error
    except auth.GoogleAuthError as error:
        hint = "run `gcloud auth application-default login`, or run under a service account"
        raise SkdError(f"no valid Google credentials: {error}", where=uri, hint=hint) from error
    except (api.GoogleAPIError, RequestException) as error:
        raise SkdError(f"Google Cloud Storage failed: {error}", where=uri, hint="try again later") from error
