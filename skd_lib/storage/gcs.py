"""Google Cloud Storage.

An object is whole or not there. Google's client sends it in one request, or in a resumable session where it is large,
with its crc32c, and on the condition that its name still holds the generation that it held when the upload began. So
of two writers of one object one wins and the other gets an error, and a retry whose first answer got lost cannot undo
what another process has written since.

Credentials are Google's application default credentials; with `STORAGE_EMULATOR_HOST` set, the emulator at that address
is used without credentials.
"""

from __future__ import annotations

import base64
import functools
import io
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import IO, Any, TypeVar

import google_crc32c
from google.api_core import exceptions as api
from google.auth import exceptions as auth
from google.cloud import storage
from google.cloud.storage.exceptions import DataCorruption
from google.cloud.storage.retry import DEFAULT_RETRY
from requests.exceptions import RequestException  # type: ignore[import-untyped, unused-ignore]

from skd_lib.errors import SkdError, Transient
from skd_lib.storage.local import atomic_directory, atomic_file
from skd_lib.storage.objects import (
    GCS,
    TEMPORARY,
    Missing,
    StoredObject,
    files_by_target,
    join,
    local_errors,
    missing,
    relative,
)
from skd_lib.storage.transfers import DEADLINE_VARIABLE, Meter, deadline, in_parallel

log = logging.getLogger(__name__)
T = TypeVar("T")

TIMEOUT_SECONDS = (10.0, 60.0)
"""To connect, and between two packets of an answer."""
CHUNK_BYTES = 32 * 2**20
"""Size of one request of a resumable upload, which is sent again after an interruption."""
PAUSE_SECONDS = (0.2, 10.0)
"""Longest pauses before a request is tried again: at first, and in a long outage."""
_LOST_SESSION = {308, 404, 410}
"""Answers of a server that has kept nothing of a session, or does not know it."""
_ATTEMPTS = 3
"""Times that a transfer is sent which arrives corrupted, or whose session the server has lost."""


def exists(uri: str) -> bool:
    """Tell whether there is an object or a folder."""
    with _opened(uri) as (bucket, name):
        return _bucket(bucket).blob(name).exists(**_patience()) or any(_blobs(bucket, name))


@contextmanager
def open_binary(uri: str) -> Iterator[IO[bytes]]:
    """Open an object for reading; ranges are fetched as they are read."""
    with _opened(uri):
        blob = _existing(uri)
        with _while_it_stays(uri), _pinned(blob).open("rb", **_patience()) as stream:
            yield stream


def read_bytes(uri: str) -> bytes:
    """Return an object's content, verified."""
    with _opened(uri):
        content = io.BytesIO()
        _fetch(_existing(uri), content, content)
        return content.getvalue()


def download(uri: str, to: Path) -> None:
    """Copy an object or a folder to a local path, several objects at once, each verified."""
    with local_errors(str(to), "write"), _opened(uri) as (bucket, name):
        single = _bucket(bucket).get_blob(name, **_patience()) if name else None
        if single is not None:
            with atomic_file(to) as temporary:
                _fetch_file(single, temporary, Meter(f"fetching {to.name}", single.size))
            return
        blobs = list(_blobs(bucket, name))
        if not blobs:
            raise missing(uri)
        with atomic_directory(to) as folder:
            targets = [folder / relative(blob.name, name) for blob in blobs]
            for parent in {target.parent for target in targets}:
                parent.mkdir(parents=True, exist_ok=True)
            meter = Meter(f"fetching {to.name}", sum(blob.size for blob in blobs))
            pairs = zip(blobs, targets, strict=True)
            in_parallel([partial(_fetch_file, blob, target, meter) for blob, target in pairs])


def upload(path: Path, uri: str, last: str) -> None:
    """Copy a file or a folder, several files at once; see the module's text.

    Each object changes as soon as it has arrived. `last` is sent after the others; one that is there from before is
    deleted first, so that it never stands with a mixture of old and new files.
    """
    with _opened(uri) as (bucket, name):
        files = files_by_target(path, name)
        marker = join(name, last) if last else ""
        meter = Meter(f"uploading {path.name}", sum(file.stat().st_size for file in files.values()))
        if path.is_file():
            present = _bucket(bucket).get_blob(name, **_patience())
            before = {} if present is None else {name: int(present.generation)}
        else:
            before = {blob.name: int(blob.generation) for blob in _blobs(bucket, name)}
        if marker in files and marker in before:
            _retract(bucket, marker, before.pop(marker), files[marker])
        others = [target for target in files if target != marker]
        for names in (others, [marker] if marker in files else []):
            in_parallel([partial(_send, bucket, name, files[name], before.get(name, 0), meter) for name in names])


def list_objects(uri: str) -> list[StoredObject]:
    """List the object, or else those in the folder."""
    with _opened(uri) as (bucket, name):
        blob = _bucket(bucket).get_blob(name, **_patience()) if name else None
        blobs = [blob] if blob is not None else sorted(_blobs(bucket, name), key=lambda blob: str(blob.name))
        if not blobs:
            raise missing(uri)
        objects = []
        for blob in blobs:
            place, checksum, modified = f"{GCS}{bucket}/{blob.name}", f"crc32c:{blob.crc32c}", blob.updated.timestamp()
            objects.append(StoredObject(place, int(blob.size), str(blob.generation), checksum, modified))
        return objects


def file_sizes(uri: str) -> dict[str, int]:
    """Return the bytes of each object in the folder, by its name in it."""
    with _opened(uri) as (bucket, name):
        return {str(relative(blob.name, name)): int(blob.size) for blob in _blobs(bucket, name)}


def create_object(uri: str, content: bytes, *, replacing: str = "0") -> str | None:
    """Write the object only if it is still in the generation `replacing`; "0": only if there is none.

    Of several processes that do this at a time one succeeds. Where its answer gets lost and the request is repeated,
    the writer itself may get None: `content` has to tell whose object is there. Return the new generation; None if the
    object is in another one.
    """
    with _opened(uri) as (bucket, name):
        blob = _bucket(bucket).blob(name)
        condition = {"if_generation_match": int(replacing)}
        try:
            _repeat(uri, lambda: blob.upload_from_string(content, **condition, **_patience()))
        except api.PreconditionFailed:
            return None
        return str(blob.generation)


def delete_object(uri: str, generation: str) -> None:
    """Delete the object if it is still in this generation; nothing happens where it is not."""
    with _opened(uri) as (bucket, name), suppress(api.NotFound, api.PreconditionFailed):
        _bucket(bucket).blob(name).delete(if_generation_match=int(generation), **_patience())


def delete(uri: str) -> None:
    """Delete the object or the folder."""
    with _opened(uri) as (bucket, name):
        if not name:
            raise SkdError("a whole bucket is not deleted", where=uri, hint="name a folder in it")
        for blob in [_bucket(bucket).blob(name), *_blobs(bucket, name, temporary=True)]:
            with suppress(api.NotFound):  # another process was faster
                blob.delete(**_patience())


def check_writable(uri: str, probe: str) -> None:
    """Write a small object into the folder, and delete it."""
    with _opened(uri) as (bucket, name):
        blob = _bucket(bucket).blob(join(name, probe))
        blob.upload_from_string(b"skd", **_patience())
        blob.delete(**_patience())


def _send(bucket: str, name: str, file: Path, generation: int, meter: Meter) -> None:
    """Send a file to its name, if that is still in `generation`; 0: if nothing is there."""
    uri, size = f"{GCS}{bucket}/{name}", file.stat().st_size

    def transfer() -> None:
        nonlocal generation
        blob = _bucket(bucket).blob(name, chunk_size=CHUNK_BYTES)
        condition = {"if_generation_match": generation, "checksum": "crc32c"}
        try:
            with file.open("rb") as stream:
                blob.upload_from_file(meter.watch(stream, name), size=size, **condition, **_patience())
        except DataCorruption:
            generation = 0  # the server had taken it, and the client has deleted it
            raise

    try:
        _repeat(uri, transfer)
    except api.PreconditionFailed as error:
        present = _bucket(bucket).get_blob(name, **_patience())
        with file.open("rb") as stream:
            if present is not None and present.size == size and present.crc32c == _crc32c(stream):
                return  # this very request was faster, and its answer got lost
        raise _overtaken(uri, file, is_there=present is not None) from error


def _retract(bucket: str, name: str, generation: int, file: Path) -> None:
    """Delete the object if it is still in this generation."""
    try:
        with suppress(api.NotFound):  # the answer to the first request got lost
            _bucket(bucket).blob(name).delete(if_generation_match=generation, **_patience())
    except api.PreconditionFailed as error:
        raise _overtaken(f"{GCS}{bucket}/{name}", file, is_there=True) from error


def _overtaken(uri: str, file: Path, *, is_there: bool) -> SkdError:
    did = "wrote this object in the meantime; theirs is whole and stays" if is_there else "deleted it"
    return SkdError(f"another process {did}", where=uri, hint=f"look at it; to replace it, upload {file} again")


def _fetch_file(blob: Any, to: Path, meter: Meter) -> None:
    with to.open("w+b") as file:
        _fetch(blob, file, meter.watch(file, str(to)))


def _fetch(blob: Any, file: IO[bytes], watched: Any) -> None:
    """Write an object's content to a file, through `watched`, and compare its checksum with what the store says.

    The client compares too, but not after an interruption. What it unpacks on the way (gzip) it compares before.
    """
    uri = f"{GCS}{blob.bucket.name}/{blob.name}"

    def transfer() -> None:
        file.seek(0)
        file.truncate()
        with _while_it_stays(uri):
            _pinned(blob).download_to_file(watched, checksum="crc32c", **_patience())
        file.seek(0)
        if not blob.content_encoding and blob.crc32c != (here := _crc32c(file)):
            raise DataCorruption(None, f"crc32c of {uri} is {here} here and {blob.crc32c} there")

    _repeat(uri, transfer)


def _repeat(uri: str, transfer: Callable[[], T]) -> T:
    """Run a transfer, and again where it arrives corrupted or the server has lost its session."""
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            return transfer()
        except (DataCorruption, ValueError, api.GoogleAPICallError) as error:
            refused = isinstance(error, api.BadRequest) and "crc32c" in str(error).lower()
            corrupt = refused or isinstance(error, DataCorruption)
            # ValueError: the client's own count of bytes and the server's differ.
            if not (corrupt or isinstance(error, ValueError) or error.code in _LOST_SESSION):
                raise
            if attempt == _ATTEMPTS and corrupt:
                raise DataCorruption(None, f"{_ATTEMPTS} times in a row: {error}") from error
            if attempt == _ATTEMPTS:
                raise (ConnectionError(str(error)) if isinstance(error, ValueError) else error) from error
            reason = "was corrupted on the way" if corrupt else "lost its session"
            log.warning("the transfer of %s %s and begins again: %s", uri, reason, error)
    raise AssertionError("unreachable")


def _existing(uri: str) -> Any:
    bucket, name = _split(uri)
    blob = _bucket(bucket).get_blob(name, **_patience())
    if blob is None:
        raise missing(uri)
    return blob


def _pinned(blob: Any) -> Any:
    """Return the object at the generation that was listed: what is overwritten while it is read must fail, not mix."""
    return blob.bucket.blob(blob.name, generation=blob.generation)


class _Replaced(Missing, Transient):
    """An object that was there a moment ago is not any more."""


@contextmanager
def _while_it_stays(uri: str) -> Iterator[None]:
    """Explain that an object which was there a moment ago is not any more."""
    try:
        yield
    except api.NotFound as error:
        raise _Replaced("it was replaced or deleted while it was read", where=uri, hint="try again") from error


def _crc32c(file: IO[bytes]) -> str:
    checksum = google_crc32c.Checksum()
    while piece := file.read(2**20):
        checksum.update(piece)
    return base64.b64encode(checksum.digest()).decode()


def _patience() -> dict[str, Any]:
    """Return how a request is tried again. All of them may be: each reads, or is on a condition."""
    first, longest = PAUSE_SECONDS
    retry = DEFAULT_RETRY.with_timeout(deadline()).with_delay(initial=first, multiplier=2.0, maximum=longest)
    return {"retry": retry, "timeout": TIMEOUT_SECONDS}


def _bucket(name: str) -> Any:
    return _client_for(os.environ.get("STORAGE_EMULATOR_HOST", ""), os.getpid()).bucket(name)


@functools.lru_cache(maxsize=4)
def _client_for(_emulator: str, _process: int) -> Any:
    """Return one client, hence one token and one connection pool, a process and an emulator."""
    # No project: reading and writing objects needs none, and outside Google Cloud there is none to find.
    return storage.Client(project=None)


def _split(uri: str) -> tuple[str, str]:
    bucket, _, name = uri.removeprefix(GCS).partition("/")
    if not bucket:
        raise SkdError("the URI names no bucket", where=uri, hint="write gs://BUCKET/NAME")
    return bucket, name.strip("/")


def _blobs(bucket: str, folder: str, *, temporary: bool = False) -> Iterator[Any]:
    """Yield the objects in a folder, without the empty objects that stand for folders and what older versions left."""
    for blob in _bucket(bucket).list_blobs(prefix=f"{folder}/" if folder else None, **_patience()):
        if not blob.name.endswith("/") and (temporary or not blob.name.endswith(TEMPORARY)):
            yield blob


@contextmanager
def _opened(uri: str) -> Iterator[tuple[str, str]]:
    """Yield the URI's bucket and name, and turn what the client library raises into sentences."""
    try:
        yield _split(uri)
    except api.NotFound as error:
        raise Missing("no such bucket or object", where=uri, hint="check the URI") from error
    except (api.Forbidden, api.Unauthorized) as error:
        hint = "grant this account roles/storage.objectUser on the bucket"
        raise SkdError(f"access denied: {error.message}", where=uri, hint=hint) from error
    except DataCorruption as error:
        raise Transient(f"the transfer was corrupted: {error}", where=uri, hint="try again") from error
    except auth.GoogleAuthError as error:
        if error.retryable:
            what = f"Google's credentials cannot be had now: {error}"
            raise Transient(what, where=uri, hint="try again later") from error
        hint = "run `gcloud auth application-default login`, or run under a service account"
        raise SkdError(f"no valid Google credentials: {error}", where=uri, hint=hint) from error
    except (api.GoogleAPIError, RequestException, ConnectionError) as error:
        hint = f"try again later; {DEADLINE_VARIABLE} (now {deadline():g} seconds) says how long a request is retried"
        # A request that it finds wrong, e.g. for a bucket of an impossible name, stays so; and an impossible address,
        # which requests raises as a ValueError, too.
        kind = SkdError if isinstance(error, api.BadRequest | ValueError) else Transient
        raise kind(f"Google Cloud Storage failed: {error}", where=uri, hint=hint) from error
