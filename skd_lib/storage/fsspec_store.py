"""Object storage of other kinds, through fsspec and its packages where they are installed.

Each file is sent under a temporary name and moved to its own when it is complete. Conditions and checksums are what the
package and the store behind it offer; sizes are compared.
"""

from __future__ import annotations

import errno
import os
import socket
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

from skd_lib._core.uris import shown
from skd_lib.errors import SkdError, Transient, is_full_disk, unwritable
from skd_lib.storage.local import atomic_directory, atomic_file
from skd_lib.storage.objects import TEMPORARY, StoredObject, files_by_target, join, missing, relative
from skd_lib.storage.transfers import in_parallel

PACKAGES = {
    "s3": "s3fs",
    "s3a": "s3fs",
    "minio": "s3fs",
    "az": "adlfs",
    "abfs": "adlfs",
    "abfss": "adlfs",
    "oci": "ocifs",
    "oss": "ossfs",
    "hdfs": "pyarrow",
    "webhdfs": "fsspec requests",
    "memory": "fsspec",
}
"""Package to install for each scheme."""
EXTRAS = {"s3fs": "'skd-lib[s3]'"}
"""Extra that installs a package together with this one."""
KUBEFLOWS_OWN = ("http://seaweedfs.kubeflow:9000", "http://minio-service.kubeflow:9000")
"""Addresses of `minio://`, the storage of artifacts that Kubeflow brings along, unless AWS_ENDPOINT_URL says otherwise.

The first is Kubeflow Pipelines' since 2.16. 2.15 has a service of this name, too, but without the port.
"""
BOTOCORE = {"connect_timeout": 5, "read_timeout": 20, "retries": {"total_max_attempts": 1}}
"""Settings of s3fs: it repeats requests by itself, so that botocore's own repetitions multiply the time of silence."""
_RAISING = ("aiohttp", "azure", "botocore")
# As s3fs translates what S3 says of a wrong request: of a bucket's name, a region, a key.
_WRONG = (errno.EINVAL, errno.EMSGSIZE, errno.ENAMETOOLONG, errno.ENOSYS, getattr(errno, "EREMCHG", errno.EINVAL))
"""Libraries below fsspec's packages that raise errors of their own."""


def exists(uri: str) -> bool:
    """Tell whether there is an object or a folder."""
    with _opened(uri) as (store, path):
        return bool(store.exists(path))


@contextmanager
def open_binary(uri: str) -> Iterator[IO[bytes]]:
    """Open an object for reading; ranges are fetched as they are read."""
    with _opened(uri) as (store, path), store.open(path, "rb") as stream:
        yield stream


def read_bytes(uri: str) -> bytes:
    """Return an object's content."""
    with _opened(uri) as (store, path):
        content: bytes = store.cat_file(path)
        return content


def download(uri: str, to: Path) -> None:
    """Copy an object or a folder to a local path."""
    with _opened(uri) as (store, path):
        if store.isfile(path):
            with atomic_file(to) as temporary:
                _fetch(store, path, temporary)
            return
        found = _find(store, path)
        if not found:
            raise missing(uri)
        with atomic_directory(to) as folder:
            targets = {name: folder / relative(name, path) for name in found}
            for parent in {target.parent for target in targets.values()}:
                parent.mkdir(parents=True, exist_ok=True)
            in_parallel([partial(_fetch, store, name, target) for name, target in targets.items()])


def upload(path: Path, uri: str, last: str) -> None:
    """Copy a file or a folder; `last` appears after the others."""
    with _opened(uri) as (store, root):
        targets = files_by_target(path, root)
        staged = {target: f"{target}.{uuid.uuid4().hex}{TEMPORARY}" for target in targets}
        try:
            in_parallel([partial(_send, store, file, staged[target]) for target, file in targets.items()])
            marker = join(root, last)
            if last and marker in targets and store.exists(marker):
                store.rm(marker)
            for target in sorted(targets, key=lambda target: targets[target] == path / last):
                store.mv(staged[target], target)
        finally:
            for temporary in staged.values():
                if store.exists(temporary):
                    store.rm(temporary)


def list_objects(uri: str) -> list[StoredObject]:
    """List the object, or else those in the folder."""
    with _opened(uri) as (store, path):
        found = {path: store.info(path)} if store.isfile(path) else _find(store, path)
        if not found:
            raise missing(uri)
        scheme = uri.partition("://")[0]
        objects = []
        for name, info in sorted(found.items()):
            place, modified = f"{scheme}://{name.lstrip('/')}", store.modified(name).timestamp()
            objects.append(StoredObject(place, int(info["size"]), "", _token(store, name, info), modified))
        return objects


def file_sizes(uri: str) -> dict[str, int]:
    """Return the bytes of each object in the folder, by its name in it."""
    with _opened(uri) as (store, path):
        return {str(relative(name, path)): int(info["size"]) for name, info in _find(store, path).items()}


def delete(uri: str) -> None:
    """Delete the object or the folder."""
    with _opened(uri) as (store, path):
        if "/" not in path.strip("/"):
            raise SkdError("a whole bucket is not deleted", where=uri, hint="name a folder in it")
        if store.exists(path):
            store.rm(path, recursive=True)


def check_writable(uri: str, probe: str) -> None:
    """Write a small object into the folder, and delete it."""
    with _opened(uri) as (store, path):
        store.pipe_file(join(path, probe), b"skd")
        store.rm_file(join(path, probe))


def _open(uri: str) -> tuple[Any, str]:
    import fsspec

    scheme, _, rest = uri.partition("://")
    kind = "s3" if scheme == "minio" else scheme
    fsspec.get_filesystem_class(kind)  # a package that is missing is said before any address is looked for
    store = fsspec.filesystem(kind, **_options(scheme))
    store.invalidate_cache()  # of listings: other processes write here, too, and are waited for
    return store, str(store._strip_protocol(f"{kind}://{rest}")).rstrip("/")


def _options(scheme: str) -> dict[str, Any]:
    options: dict[str, Any] = {"config_kwargs": BOTOCORE} if PACKAGES[scheme] == "s3fs" else {}
    return options | ({"endpoint_url": _endpoint(scheme)} if scheme == "minio" else {})


def _endpoint(scheme: str) -> str:
    """Return the address of the storage, where this package knows it; else empty."""
    if scheme not in ("minio", "s3", "s3a"):
        return ""
    return os.environ.get("AWS_ENDPOINT_URL") or (kubeflows_own() if scheme == "minio" else "")


@cache
def kubeflows_own() -> str:
    """Return the address of the storage that Kubeflow brings along: the first that answers, else one that is away."""
    known = []
    for endpoint in KUBEFLOWS_OWN:
        address = urlsplit(endpoint)
        try:
            socket.create_connection((address.hostname, address.port), timeout=2).close()
        except socket.gaierror:
            continue
        except OSError:
            known.append(endpoint)
        else:
            return endpoint
    if known:
        return known[-1]  # it is away, and may come back while it is asked again
    hint = "in a cluster where it is elsewhere set `aws-endpoint-url` in the Secret `skd-storage`; or AWS_ENDPOINT_URL"
    what = f"Kubeflow's own storage is not found: there is no {' and no '.join(KUBEFLOWS_OWN)}"
    raise SkdError(what, where="minio://", hint=hint)


def _find(store: Any, path: str) -> dict[str, Any]:
    found: dict[str, Any] = store.find(path, detail=True)
    return {name: info for name, info in found.items() if not name.endswith(TEMPORARY)}


def _fetch(store: Any, name: str, to: Path) -> None:
    store.get_file(name, str(to))
    _compare(store, name, to)


def _send(store: Any, file: Path, name: str) -> None:
    store.put_file(str(file), name)
    _compare(store, name, file)


def _compare(store: Any, name: str, file: Path) -> None:
    here, there = file.stat().st_size, int(store.info(name)["size"])
    if here != there:
        raise Transient(f"the transfer was cut off: {here} bytes here, {there} there", where=name, hint="try again")


def _token(store: Any, name: str, info: dict[str, Any]) -> str:
    etag = info.get("ETag") or info.get("etag")
    return f"etag:{etag}" if etag else f"ukey:{store.ukey(name)}"


@contextmanager
def _opened(uri: str) -> Iterator[tuple[Any, str]]:
    """Yield the store and the path in it, and turn what the packages raise into sentences."""
    scheme = uri.partition("://")[0]
    try:
        yield _open(uri)
    except ImportError as error:
        package = PACKAGES[scheme]
        hint = f"pip install {EXTRAS.get(package, package)}"
        raise SkdError(f"{scheme}:// needs another package: {package}", where=uri, hint=hint) from error
    except FileNotFoundError as error:
        raise missing(uri) from error
    except PermissionError as error:
        what = f"access denied{_at(scheme)}: {error}"
        raise SkdError(what, where=uri, hint="check the credentials of this storage") from error
    except OSError as error:
        if is_full_disk(error):
            raise unwritable(error) from error
        if error.errno in _WRONG:
            what, hint = f"{scheme}:// refuses{_at(scheme)}: {error}", "correct the name or the storage's settings"
            raise SkdError(what, where=uri, hint=hint) from error
        raise Transient(f"{scheme}:// failed{_at(scheme)}: {error}", where=uri, hint="try again later") from error
    except Exception as error:
        if type(error).__module__.partition(".")[0] not in _RAISING:
            raise
        hint = "check the storage's credentials and address (in a cluster the Secret `skd-storage`), and the network"
        raise SkdError(f"{scheme}:// failed{_at(scheme)}: {error}", where=uri, hint=hint) from error


def _at(scheme: str) -> str:
    endpoint = shown(_endpoint(scheme))
    return f" at {endpoint}" if endpoint else ""
