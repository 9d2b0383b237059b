"""Sentences for unexpected exceptions, in place of a traceback.

The operating system's errors are about the user's machine and files. The rest are bugs of skd, whose traceback is kept
for a report.
"""

from __future__ import annotations

import errno
import importlib.metadata
import os
import platform
import sys
import tempfile
import time
import traceback
from pathlib import Path

from skd_lib import __version__
from skd_lib._core import events
from skd_lib.errors import SkdError, is_full_disk, unwritable

LONGEST = 500
EXTRAS = ("training", "tracking", "pipelines")
"""The extras that a run on this machine needs."""
IN_SOURCE_TREE = (Path(__file__).resolve().parents[2] / "pyproject.toml").is_file()
INSTALL = 'pip install -c constraints/main.txt -e ".{}"' if IN_SOURCE_TREE else "pip install 'skd-lib{}'"
_HINTS = {
    errno.ENOENT: "check the path",
    errno.EACCES: "change its permissions, or choose another place",
    errno.EPERM: "change its permissions, or choose another place",
    errno.EROFS: "choose another place",
    errno.EISDIR: "name a file, not a folder",
    errno.ENOTDIR: "check the path: a part of it is a file",
    errno.EEXIST: "choose another name, or remove what is there",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EADDRINUSE: "choose another port, or end the program that has it",
    errno.EMFILE: "raise the limit of open files (`ulimit -n`)",
}


class Bug(SkdError):
    """An unexpected exception. Its exit code is BSD's `EX_SOFTWARE`."""

    exit_code = 70


def explained(error: Exception) -> SkdError:
    """Return the error to show the user; the traceback of a bug is kept, in the log of a step or in a file.

    A step with a runner, or in Kubernetes, writes it to its log: files of a pod are gone when it ends.
    """
    if isinstance(error, SkdError):
        return error
    if is_full_disk(error):
        return unwritable(error)
    if isinstance(error, OSError) and error.errno is not None:
        hint = _HINTS.get(error.errno, "")
        return SkdError(error.strerror or str(error), where=str(error.filename2 or error.filename or ""), hint=hint)
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        hint = "lower the batch size or task.max_new_tokens, or take a machine with more memory"
        return SkdError(f"out of memory: {_line(error)}", hint=hint)
    if isinstance(error, ModuleNotFoundError):
        return SkdError(f"the Python package `{error.name}` is missing", hint=install_command(error.name or ""))
    return Bug(
        f"this is a bug in skd: {type(error).__name__}: {_line(error)}; please report it and attach {_keep(error)}"
    )


def install_command(module: str) -> str:
    """Return the command that installs a module: with the extra of skd that has its package, else with all extras."""
    from packaging.requirements import Requirement

    try:
        declared = [Requirement(text) for text in importlib.metadata.requires("skd-lib") or []]
    except importlib.metadata.PackageNotFoundError:
        declared = []
    # Of `google.cloud.storage` Python names the first part that is missing, be it `google`; `torch.nn` is of `torch`.
    package = module.replace(".", "-").replace("_", "-").lower()
    found = [one for one in declared if f"{one.name}-".startswith(f"{package}-")]
    found += [one for one in declared if f"{package}-".startswith(f"{one.name}-")]
    for extra in ("", *EXTRAS, "quantization", "s3"):
        if any(one.marker is None or one.marker.evaluate({"extra": extra}) for one in found):
            return INSTALL.format(f"[{extra}]" if extra else "")
    return INSTALL.format(f"[{','.join(EXTRAS)}]")


def _line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


def _keep(error: Exception) -> str:
    """Keep the traceback, and return its place."""
    from skd_lib._core.uris import redacted

    details = redacted("".join(traceback.format_exception(error)))
    if os.environ.get(events.ENV) or os.environ.get("KUBERNETES_SERVICE_HOST"):
        print(details, file=sys.stderr)
        return "this step's log"
    head = f"skd {__version__}, Python {platform.python_version()}, {platform.platform()}\n\n"
    path = Path(tempfile.gettempdir()) / f"skd-bug-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.txt"
    try:
        path.write_text(head + details, encoding="utf-8")
    except OSError as unwritten:
        return f"what led to it (the details could not be written to {path}: {unwritten})"
    return str(path)
