"""Google Cloud Storage.

An upload is whole or not there: each object is sent under a temporary name (in a resumable session where it is large),
its checksum is compared with the file's, and only then it is rewritten to its own name, on the condition that this name
still holds what it held when the upload began. So of two writers of one object one wins and the other is told, and a
retry whose first answer got lost cannot undo what somebody else has written since.

Credentials are Google's application default credentials; with `STORAGE_EMULATOR_HOST` set, the emulator at that address
is used without credentials.
"""

from __future__ import annotations

import base64
import functools
import logging
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

from skd_lib.errors import SkdError
from skd_lib.storage.errors import Missing, local_errors, missing
from skd_lib.storage.local import atomic_directory, atomic_file
from skd_lib.storage.objects import TEMPORARY, StoredObject, files_by_target, join, relative
from skd_lib.storage.transfers import DEADLINE_VARIABLE, Meter, deadline, in_parallel

log = logging.getLogger(__name__)

SCHEME = "gs://"
_TIMEOUT = (10.0, 60.0)  # seconds to connect, and between two packets of an answer
_CHUNK = 32 * 2**20  # of a resumable upload: what is sent again after an interruption
_PAUSES = (0.2, 10.0)  # seconds, at most, before a request is tried again: at first, and in a long outage
_LOST_SESSION = {308, 404, 410}  # nothing was kept, or the session has never been or is no more
_ATTEMPTS = 3  # at a transfer that was corrupted, or whose session the server has lost


def exists(uri: str) -> bool:
    """Whether there is an object or a folder."""
    bucket, name = _split(uri)
    with _cloud_errors(uri):
        return _bucket(bucket).blob(name).exists(**_patience()) or any(_blobs(bucket, name))


@contextmanager
def open_binary(uri: str) -> Iterator[IO[bytes]]:
    """Open an object for reading; ranges are fetched as they are read."""
    bucket, name = _split(uri)
    with _cloud_errors(uri):
        blob = _bucket(bucket).get_blob(name, **_patience())
        if blob is None:
            raise missing(uri)
        with _while_it_stays(uri), _pinned(blob).open("rb", **_patience()) as stream:
            yield stream


def read_bytes(uri: str) -> bytes:
    """An object's content, verified."""
    bucket, name = _split(uri)
    with _cloud_errors(uri):
        blob = _bucket(bucket).get_blob(name, **_patience())
        if blob is None:
            raise missing(uri)
        for attempt in range(1, _ATTEMPTS + 1):
            with _again_if_corrupt(uri, attempt), _while_it_stays(uri):
                content: bytes = _pinned(blob).download_as_bytes(checksum="crc32c", **_patience())
                _compare(uri, blob, _crc32c(content))
                return content
    raise AssertionError("unreachable")


def download(uri: str, to: Path) -> None:
    """Copy an object or a folder to a local path, several objects at once, each verified."""
    bucket, name = _split(uri)
    with local_errors(str(to), "write"), _cloud_errors(uri):
        single = _bucket(bucket).get_blob(name, **_patience()) if name else None
        if single is not None:
            with atomic_file(to) as temporary:
                _fetch(single, temporary, Meter(f"fetching {to.name}", single.size))
            return
        blobs = list(_blobs(bucket, name))
        if not blobs:
            raise missing(uri)
        with atomic_directory(to) as folder:
            targets = [folder / relative(blob.name, name) for blob in blobs]
            for parent in {target.parent for target in targets}:
                parent.mkdir(parents=True, exist_ok=True)
            meter = Meter(f"fetching {to.name}", sum(blob.size for blob in blobs))
            in_parallel([partial(_fetch, blob, target, meter) for blob, target in zip(blobs, targets, strict=True)])


def upload(path: Path, uri: str, last: str) -> None:
    """Copy a file or a folder, several files at once; see the module's text.

    No name changes before everything is there under temporary names; then all are renamed, `last` after the others. One
    that is there from before is deleted first, so that it never stands beside a mixture of old files and new ones.
    """
    bucket, name = _split(uri)
    files = files_by_target(path, name)
    meter = Meter(f"uploading {path.name}", sum(file.stat().st_size for file in files.values()))
    uploads = [_Upload(bucket, target, file) for target, file in files.items()]
    markers = [each for each in uploads if last and each.file == path / last]
    others = [each for each in uploads if not last or each.file != path / last]
    with _cloud_errors(uri):
        try:
            in_parallel([partial(each.send, meter) for each in uploads])
            in_parallel([each.retract for each in markers])
            in_parallel([each.publish for each in others])
            in_parallel([each.publish for each in markers])
        finally:
            in_parallel([each.clean_up for each in uploads])


def list_objects(uri: str) -> list[StoredObject]:
    """The object, or else those in the folder."""
    bucket, name = _split(uri)
    with _cloud_errors(uri):
        blob = _bucket(bucket).get_blob(name, **_patience()) if name else None
        blobs = [blob] if blob is not None else sorted(_blobs(bucket, name), key=lambda blob: str(blob.name))
        if not blobs:
            raise missing(uri)
        return [
            StoredObject(
                f"{SCHEME}{bucket}/{blob.name}",
                int(blob.size),
                str(blob.generation),
                f"crc32c:{blob.crc32c}",
                blob.updated.timestamp(),
            )
            for blob in blobs
        ]


def file_sizes(uri: str) -> dict[str, int]:
    """Bytes of each object in the folder, by its name in it."""
    bucket, name = _split(uri)
    with _cloud_errors(uri):
        return {str(relative(blob.name, name)): int(blob.size) for blob in _blobs(bucket, name)}


def create_object(uri: str, content: bytes, *, replacing: str = "0") -> str | None:
    """Write the object only if it is still in the generation `replacing`; "0": only if there is none.

    Of several who do this at a time one succeeds. Where its answer gets lost and the request is repeated, the writer
    itself may be told that it lost: `content` has to tell.

    Returns:
        The new generation; None if the object is in another one.
    """
    from google.api_core.exceptions import PreconditionFailed

    bucket, name = _split(uri)
    with _cloud_errors(uri):
        blob = _bucket(bucket).blob(name)
        for attempt in range(1, _ATTEMPTS + 1):
            with _again_if_corrupt(uri, attempt):
                try:
                    blob.upload_from_string(content, if_generation_match=int(replacing), **_patience())
                except PreconditionFailed:
                    return None
                return str(blob.generation)
    raise AssertionError("unreachable")


def delete_object(uri: str, generation: str) -> None:
    """Delete the object if it is still in this generation; nothing happens where it is not."""
    from google.api_core.exceptions import NotFound, PreconditionFailed

    bucket, name = _split(uri)
    with _cloud_errors(uri), suppress(NotFound, PreconditionFailed):
        _bucket(bucket).blob(name).delete(if_generation_match=int(generation), **_patience())


def delete(uri: str) -> None:
    """Delete the object or the folder, with what interrupted uploads left there."""
    from google.api_core.exceptions import NotFound

    bucket, name = _split(uri)
    if not name:
        raise SkdError("a whole bucket is not deleted", where=uri, hint="name a folder in it")
    with _cloud_errors(uri):
        for blob in [_bucket(bucket).blob(name), *_blobs(bucket, name, temporary=True)]:
            with suppress(NotFound):  # another process was faster
                blob.delete(**_patience())


def check_writable(uri: str, probe: str) -> None:
    """Write a small object into the folder, and delete it."""
    bucket, name = _split(uri)
    with _cloud_errors(uri):
        blob = _bucket(bucket).blob(join(name, probe))
        blob.upload_from_string(b"skd", **_patience())
        blob.delete(**_patience())


@dataclass
class _Upload:
    """One file on its way to its name in the bucket."""

    bucket: str
    name: str
    file: Path
    staged: Any = None
    crc32c: str = ""
    generation: int = 0
    """Of what is at the name when the upload begins; 0: nothing."""

    @property
    def uri(self) -> str:
        return f"{SCHEME}{self.bucket}/{self.name}"

    def send(self, meter: Meter) -> None:
        """Send the file to a temporary name."""
        before = _bucket(self.bucket).get_blob(self.name, **_patience())
        self.generation = 0 if before is None else int(before.generation)
        self.crc32c = _crc32c_of_file(self.file)
        for attempt in range(1, _ATTEMPTS + 1):
            self.clean_up()  # of the attempt before
            with (
                _again_if_corrupt(self.uri, attempt),
                _again_if_the_session_is_lost(self.uri, attempt),
                self.file.open("rb") as file,
            ):
                temporary = f"{self.name}.{uuid.uuid4().hex}{TEMPORARY}"
                self.staged = _bucket(self.bucket).blob(temporary, chunk_size=_CHUNK)
                size = self.file.stat().st_size
                # Nobody else has this name: no condition, so that a request whose answer got lost can be sent again.
                self.staged.upload_from_file(meter.watch(file, self.name), size=size, checksum="crc32c", **_patience())
                _compare(self.uri, self.staged, self.crc32c)
                return

    def retract(self) -> None:
        """Delete what is at its own name from before, and see that nobody else has put anything there since."""
        from google.api_core.exceptions import NotFound, PreconditionFailed

        target = _bucket(self.bucket).blob(self.name)
        if self.generation:
            with suppress(NotFound, PreconditionFailed):
                target.delete(if_generation_match=self.generation, **_patience())
            self.generation = 0
        present = _bucket(self.bucket).get_blob(self.name, **_patience())
        if present is not None:
            raise self._overtaken(present)

    def publish(self) -> None:
        """Rewrite it to its own name, which is one atomic change."""
        from google.api_core.exceptions import PreconditionFailed

        target = _bucket(self.bucket).blob(self.name)
        token = None
        try:
            while True:
                token, _, _ = target.rewrite(
                    self.staged,
                    token=token,
                    if_generation_match=self.generation,
                    if_source_generation_match=self.staged.generation,
                    **_patience(),
                )
                if token is None:
                    return
        except PreconditionFailed as error:
            # Somebody was faster: perhaps this very request, whose answer got lost.
            present = _bucket(self.bucket).get_blob(self.name, **_patience())
            if present is not None and present.crc32c == self.crc32c and present.size == self.staged.size:
                return
            raise self._overtaken(present) from error

    def _overtaken(self, present: Any) -> SkdError:
        if present is None:
            what = "another process deleted this object in the meantime"
            hint = f"if it is wanted, upload {self.file} again"
        else:
            what = "another process wrote this object in the meantime; theirs is whole and stays"
            hint = f"look at it; to replace it, upload {self.file} again"
        return SkdError(what, where=self.uri, hint=hint)

    def clean_up(self) -> None:
        """Delete the temporary object; one that cannot be deleted is named, and harms nobody."""
        from google.api_core.exceptions import NotFound

        if self.staged is None:
            return
        try:
            self.staged.delete(**_patience())
        except NotFound:
            log.debug("%s was never finished", self.staged.name)
        except _failures() as error:
            log.warning("%s/%s stays behind and can be deleted: %s", self.bucket, self.staged.name, error)


def _fetch(blob: Any, to: Path, meter: Meter) -> None:
    uri = f"{SCHEME}{blob.bucket.name}/{blob.name}"
    for attempt in range(1, _ATTEMPTS + 1):
        with _again_if_corrupt(uri, attempt), _while_it_stays(uri):
            with to.open("wb") as file:
                _pinned(blob).download_to_file(meter.watch(file, str(to)), checksum="crc32c", **_patience())
            _compare(blob.name, blob, _crc32c_of_file(to))
            return


def _pinned(blob: Any) -> Any:
    """The object at the generation that was listed: what is overwritten while it is read must fail, not mix."""
    return blob.bucket.blob(blob.name, generation=blob.generation)


@contextmanager
def _while_it_stays(uri: str) -> Iterator[None]:
    """Say of an object that was there a moment ago what it means that its generation is not."""
    from google.api_core.exceptions import NotFound

    try:
        yield
    except NotFound as error:
        raise Missing("it was replaced or deleted while it was read", where=uri, hint="try again") from error


def _compare(uri: str, blob: Any, crc32c: str) -> None:
    """Compare with what the store says; what it unpacks on the way (gzip) the client compared before unpacking."""
    from google.cloud.storage.exceptions import DataCorruption

    if not blob.content_encoding and blob.crc32c != crc32c:
        raise DataCorruption(None, f"crc32c of {uri} is {crc32c} here and {blob.crc32c} there")


@contextmanager
def _again_if_corrupt(uri: str, attempt: int) -> Iterator[None]:
    """Let a transfer whose checksum is wrong be tried again, a few times."""
    from google.api_core.exceptions import BadRequest
    from google.cloud.storage.exceptions import DataCorruption

    try:
        yield
    except (DataCorruption, BadRequest) as error:
        if isinstance(error, BadRequest) and "crc32c" not in str(error).lower():
            raise
        if attempt == _ATTEMPTS:
            raise DataCorruption(None, f"{_ATTEMPTS} times in a row: {error}") from error
        log.warning("%s was corrupted on the way, trying again: %s", uri, error)


@contextmanager
def _again_if_the_session_is_lost(uri: str, attempt: int) -> Iterator[None]:
    """Let an upload be begun again, a few times, if the server forgot its session, or kept less than it was sent."""
    from google.api_core.exceptions import GoogleAPICallError

    try:
        yield
    except ValueError as error:
        # What the client raises where its own count of bytes and the server's differ.
        if attempt == _ATTEMPTS:
            raise ConnectionError(f"file and session are out of step: {error}") from error
        log.warning("the session for %s kept less than it was sent, beginning again: %s", uri, error)
    except GoogleAPICallError as error:
        if error.code not in _LOST_SESSION or attempt == _ATTEMPTS:
            raise
        log.warning("the session for %s is lost, beginning again: %s", uri, error)


def _crc32c(content: bytes) -> str:
    import google_crc32c

    return base64.b64encode(google_crc32c.Checksum(content).digest()).decode()


def _crc32c_of_file(path: Path) -> str:
    import google_crc32c

    checksum = google_crc32c.Checksum()
    with path.open("rb") as file:
        while piece := file.read(2**20):
            checksum.update(piece)
    return base64.b64encode(checksum.digest()).decode()


def _patience() -> dict[str, Any]:
    """How requests are tried again. All of them may be: each reads, or has a name or a generation to itself."""
    from google.cloud.storage.retry import DEFAULT_RETRY

    first, last = _PAUSES
    retry = DEFAULT_RETRY.with_timeout(deadline()).with_delay(initial=first, multiplier=2.0, maximum=last)
    return {"retry": retry, "timeout": _TIMEOUT}


def _bucket(name: str) -> Any:
    return _client_for(os.environ.get("STORAGE_EMULATOR_HOST", ""), os.getpid()).bucket(name)


@functools.lru_cache(maxsize=4)
def _client_for(_emulator: str, _process: int) -> Any:
    """One client, hence one token and one connection pool, a process and an emulator."""
    from google.cloud import storage

    # No project: reading and writing objects needs none, and outside Google Cloud there is none to find.
    return storage.Client(project=None)


def _split(uri: str) -> tuple[str, str]:
    bucket, _, name = uri.removeprefix(SCHEME).partition("/")
    if not bucket:
        raise SkdError("the URI names no bucket", where=uri, hint="write gs://BUCKET/NAME")
    return bucket, name.strip("/")


def _blobs(bucket: str, folder: str, *, temporary: bool = False) -> Iterator[Any]:
    """The objects in a folder, without unfinished uploads and the empty objects by which consoles show folders."""
    for blob in _bucket(bucket).list_blobs(prefix=f"{folder}/" if folder else None, **_patience()):
        if not blob.name.endswith("/") and (temporary or not blob.name.endswith(TEMPORARY)):
            yield blob


def _failures() -> tuple[type[Exception], ...]:
    """What the client raises when a request fails for good."""
    from google.api_core.exceptions import GoogleAPIError
    from requests.exceptions import RequestException  # type: ignore[import-untyped, unused-ignore]

    return (GoogleAPIError, RequestException, ConnectionError)


@contextmanager
def _cloud_errors(uri: str) -> Iterator[None]:
    """Turn what the client library raises into sentences."""
    try:
        from google.api_core import exceptions as api
        from google.auth import exceptions as auth
        from google.cloud.storage.exceptions import DataCorruption
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
    except _failures() as error:
        hint = f"try again later; {DEADLINE_VARIABLE} (now {deadline():g} seconds) says how long a request is retried"
        raise SkdError(f"Google Cloud Storage failed: {error}", where=uri, hint=hint) from error
