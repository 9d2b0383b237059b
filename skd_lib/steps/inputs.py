"""Input artifacts of a step: whether they are still there."""

from __future__ import annotations

import os
from pathlib import Path

from skd_lib.errors import SkdError


def present(name: str, path: Path) -> Path:
    """See that an input artifact is there, before anything is loaded.

    KFP takes a finished step from its cache without a look at what the step wrote, and its launcher says nothing where
    there is nothing to fetch: the next step finds no file, or an empty folder.

    Args:
        name: The input, as the step calls it.
        path: Its file or folder.

    Returns:
        The path.

    Raises:
        SkdError: nothing is there, or nothing is in it.
    """
    if not (any(files for _, _, files in os.walk(path)) or (path.is_file() and path.stat().st_size)):
        raise SkdError(
            f"the input `{name}` is gone from storage: nothing is there",
            where=str(path),
            hint="if a lifecycle rule of the bucket deletes old files, run again without the cache, which makes it "
            "again: `reuse` false in the form, or `skd submit --no-reuse` (in later runs too, if the namespace has no "
            "`checkpoint-root`); by hand, check the path",
        )
    return path
