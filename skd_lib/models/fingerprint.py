"""Fingerprints of a model's present content: part of the cache key of every step that fetches a model.

| reference | fingerprint |
|---|---|
| hub | `commit:` and the commit that the revision points to |
| local folder | `sha256:` over the names and contents of the files in `MODEL_FILES` |
| object storage | `sha256:` over the names, sizes, generations and checksums of the same files |
| GGUF file | `sha256:` of the file |
| wheel | `sha256:` over the wheel's digest and the member's name |

`skd_lib.models.references.model_fingerprint` makes it from a reference.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from fnmatch import fnmatchcase
from pathlib import Path

from skd_lib import storage
from skd_lib._core.machine import usable_cores
from skd_lib.storage import StoredObject
from skd_lib.storage.cache import default_cache_dir
from skd_lib.storage.objects import local_errors

MODEL_FILES = ("*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "*.py", "additional_chat_templates/*.jinja")
"""Files of a folder that change what the model, its tokenizer or its templates do: no readme, no other format."""
_OTHER_FORMATS = "consolidated*"
_DIGEST = re.compile("[0-9a-f]{64}")
BIG_FILE = 2**20
"""Bytes from which on a file's digest is worth keeping."""
SETTLED = 5.0
"""Seconds after which a further change to a file must show in its times, on any file system."""
_SHOWN = 12
_WRITTEN_BY = ("transformers_version", "_name_or_path")
"""Keys of a config that name its writer and source."""


def digest(parts: Iterable[str]) -> str:
    """Return the hex sha256 over lines of text."""
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def folder_fingerprint(folder: Path) -> str:
    """Return the fingerprint of a model in a local folder; reads big files only when they have changed."""
    files = {
        file.relative_to(folder).as_posix(): file
        for pattern in MODEL_FILES
        for file in folder.glob(pattern)
        if file.is_file() and matters(file.relative_to(folder).as_posix())
    }
    with ThreadPoolExecutor(usable_cores()) as pool:
        contents = dict(zip(files, pool.map(file_digest, files.values()), strict=True))
    return f"sha256:{digest(f'{name} {content}' for name, content in sorted(contents.items()))}"


def objects_fingerprint(uri: str, objects: Iterable[StoredObject]) -> str:
    """Return the fingerprint of a model in object storage from its folder's URI and `storage.list_objects`."""
    start = f"{uri.rstrip('/')}/"
    named = {item.uri.removeprefix(start): item for item in objects}
    return "sha256:" + digest(
        f"{name} {item.size} {item.generation} {item.checksum}" for name, item in sorted(named.items()) if matters(name)
    )


def matters(name: str) -> bool:
    """Return whether a file of a model's folder, named relative to it, is one of `MODEL_FILES`."""
    if fnmatchcase(name, _OTHER_FORMATS):
        return False
    return any(name.count("/") == pattern.count("/") and fnmatchcase(name, pattern) for pattern in MODEL_FILES)


def file_digest(path: Path) -> str:
    """Return the hex sha256 of a file.

    A big file's digest is kept in the cache (`SKD_CACHE`) under the file's path, inode, size and times, so that it is
    read again only when one of them has changed; but not for a file that was written a moment ago, since a further
    change might show in none of them.
    """
    with local_errors(str(path), "read"):
        identity = _identity(path)
        if path.stat().st_size < BIG_FILE:
            return storage.sha256(path)
        entry = default_cache_dir() / "digests" / digest(map(str, identity))
        with suppress(OSError, UnicodeDecodeError):
            if _DIGEST.fullmatch(found := entry.read_text(encoding="ascii")):
                return found
        settled = time.time() - max(identity[-2:]) / 1e9 > SETTLED
        made = storage.sha256(path)
        if settled and identity == _identity(path):
            # Without it the file is read again next time: no reason to fail.
            with suppress(OSError):
                entry.parent.mkdir(parents=True, exist_ok=True)
                storage.write_text_atomic(entry, made)
        return made


def settings_digest(folder: Path) -> str:
    """Return the hex sha256 of a model's config and own code, which besides its weights decide what it computes."""
    with local_errors(str(folder), "read"):
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        for name in _WRITTEN_BY:
            config.pop(name, None)
        code = [f"{file.name} {storage.sha256(file)}" for file in sorted(folder.glob("*.py"))]
    return digest([json.dumps(config, sort_keys=True), *code])


def short(fingerprint: str) -> str:
    """Return a fingerprint for people: `commit 0123456789ab`; empty where there is none."""
    kind, _, value = fingerprint.partition(":")
    return f"{kind} {value[:_SHOWN]}".strip()


def _identity(path: Path) -> tuple[str, int, int, int, int]:
    """Return what changes whenever a file does, unless it is written twice within the granularity of its times."""
    status = path.stat()
    return str(path.resolve()), status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
