"""The interpreter that has COMET: this one in COMET's image, elsewhere a virtual environment made when first needed."""

from __future__ import annotations

import hashlib
import importlib.metadata
import logging
import os
import subprocess
import sys
import venv
from collections import deque
from importlib.resources import files
from pathlib import Path

from skd_lib import events
from skd_lib.cache import cached_folder, default_cache_dir
from skd_lib.errors import SkdError

log = logging.getLogger(__name__)

PACKAGE = "unbabel-comet"
_LINES_SHOWN = 6
_NEWEST_PYTHON = (3, 12)  # the last for which numpy < 2 has wheels

# A source tree keeps the file beside the other constraints; a wheel carries a copy in this package.
_IN_SOURCE_TREE = Path(__file__).resolve().parents[2] / "constraints" / "comet.txt"


def read_constraints() -> str:
    """The pinned packages of COMET's environment, as pip's constraints."""
    source = _IN_SOURCE_TREE if _IN_SOURCE_TREE.is_file() else files("skd_lib.comet").joinpath("constraints.txt")
    return source.read_text(encoding="utf-8")


def comet_python() -> Path:
    """The interpreter that has COMET; outside a cluster the environment for it is made where there is none.

    Raises:
        SkdError: there is none, and it cannot be made.
    """
    if any(importlib.metadata.distributions(name=PACKAGE)):
        return Path(sys.executable)
    if "KUBERNETES_SERVICE_HOST" in os.environ:
        raise SkdError(
            "this container has no COMET, and containers install nothing while they run",
            hint="run the step in the image of images/comet",
        )
    if sys.version_info[:2] > _NEWEST_PYTHON:
        newest = ".".join(map(str, _NEWEST_PYTHON))
        raise SkdError(f"COMET needs Python {newest} or older", hint=f"make this environment with Python {newest}")
    return make_environment(read_constraints(), default_cache_dir())


def make_environment(constraints: str, cache_dir: Path) -> Path:
    """A virtual environment with the pinned COMET, from the cache or made now, which takes minutes.

    pip does it, so that the index, mirror and certificates configured for pip apply.

    Args:
        constraints: pip's constraints; one of them pins `unbabel-comet`.
        cache_dir: Holds one environment for each content of `constraints` and version of Python.

    Returns:
        Its interpreter.

    Raises:
        SkdError: pip fails, or the cache cannot be written.
    """
    key = hashlib.sha256(f"{sys.version_info[:2]}\n{constraints}".encode()).hexdigest()[:16]
    folder = cached_folder(cache_dir / f"comet-{key}", lambda path: _install(path, constraints))
    return _interpreter(folder)


def _interpreter(folder: Path) -> Path:
    return folder / "bin" / "python"


def _install(folder: Path, constraints: str) -> None:
    pins = [line for line in constraints.splitlines() if line.strip()]
    requirement = next(line for line in pins if line.startswith(f"{PACKAGE}=="))
    log.info("making an environment with %s; this happens once and takes some minutes", requirement)
    # The cache renames the folder when it is complete: its interpreter still works then, its scripts would not.
    venv.create(folder)
    file = folder / "constraints.txt"
    # Without the pin that is asked for: where it is not to be had, pip would say no more than that two pins conflict.
    file.write_text("\n".join(pin for pin in pins if pin != requirement), encoding="utf-8")
    command = [sys.executable, "-m", "pip", "--python", str(_interpreter(folder))]
    command += ["--disable-pip-version-check", "--no-input", "install", "--progress-bar=off"]
    command += ["--constraint", str(file), requirement]
    progress = events.Progress(f"installing {requirement}", len(pins))
    collected: set[str] = set()
    tail: deque[str] = deque(maxlen=_LINES_SHOWN)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as pip:
        assert pip.stdout is not None  # noqa: S101 - PIPE was asked for
        for line in pip.stdout:
            if line.strip():
                tail.append(line.rstrip())
            print(line, end="", flush=True)
            if line.startswith(("Collecting ", "Processing ")):
                collected.add(line.split()[1])
                progress.update(min(len(collected), len(pins)))
    if pip.returncode != 0:
        raise SkdError(
            f"pip could not install COMET (exit code {pip.returncode}):\n" + "\n".join(f"  {line}" for line in tail),
            where=requirement,
            hint="check the network and which index pip uses: `python3 -m pip config list`",
        )
    progress.update(len(pins))
