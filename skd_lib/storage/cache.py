"""Downloads and conversions kept between runs.

Entries are named by their content (a digest), so they never go stale and are never changed once they are there.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from skd_lib.errors import SkdError
from skd_lib.storage import atomic_directory

ENV = "SKD_CACHE"


def default_cache_dir() -> Path:
    """Return `$SKD_CACHE`, else `~/.cache/skd`."""
    return Path(os.environ.get(ENV) or Path.home() / ".cache" / "skd").expanduser()


def cached_folder(folder: Path, build: Callable[[Path], None]) -> Path:
    """Return the cache entry `folder`, made by `build` if it is not there.

    One process builds, others that want the same entry wait for it. An entry appears only when it is complete; what
    a killed process left behind is removed by the next one. `build` fills the empty folder that it gets.
    """
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder.parent / f"{folder.name}.lock")
        with lock:
            if not folder.is_dir():
                for abandoned in folder.parent.glob(f".{folder.name}.*"):
                    shutil.rmtree(abandoned)
                with atomic_directory(folder) as unfinished:
                    build(unfinished)
    except OSError as error:
        raise SkdError(
            f"cannot write the cache: {error.strerror or error}",
            where=str(folder),
            hint=f"free some space, or set {ENV} to a folder that can be written",
        ) from error
    return folder
