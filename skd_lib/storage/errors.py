"""What storage raises, as sentences."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from skd_lib.errors import SkdError


class Missing(SkdError):
    """There is no such file, object, folder or bucket."""


def missing(uri: str) -> Missing:
    """There is nothing at `uri`."""
    return Missing("no such file or folder", where=uri, hint="check the path")


@contextmanager
def local_errors(where: str, action: str) -> Iterator[None]:
    """Turn the operating system's errors into sentences."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        kind = Missing if isinstance(error, FileNotFoundError) else SkdError
        raise kind(f"cannot {action}: {reason}", where=where, hint="check the path and its permissions") from error
