"""Virtual environments for tools that this one cannot have: made by pip when first needed, and kept."""

from __future__ import annotations

import hashlib
import logging
import subprocess
import sys
import venv
from collections import deque
from dataclasses import dataclass
from pathlib import Path

from skd_lib._core import events
from skd_lib.errors import SkdError
from skd_lib.storage.cache import cached_folder

log = logging.getLogger(__name__)

_LINES_SHOWN = 6
_PYTHON = "bin/python"


@dataclass(frozen=True)
class Tool:
    """The tool that an environment is made for.

    Attributes:
        name: The beginning of the environment's folder.
        title: What people call it.
        package: Its distribution; one of the constraints pins it.
        locked: The constraints name every package with its hashes, but torch, whose version a comment names: it comes
            from whichever index pip is configured for, for CPUs or GPUs. What else the tool asks for is left out.
    """

    name: str
    title: str
    package: str
    locked: bool = False


def make_environment(tool: Tool, constraints: str, cache_dir: Path) -> Path:
    """Return the interpreter of an environment with the pinned tool, from the cache or made now, which takes minutes.

    pip does it, so that the index, mirror and certificates configured for pip apply. One of its constraints pins the
    tool's package. The cache holds one environment for each tool, its constraints and the version of Python.
    """
    key = hashlib.sha256(f"{sys.version_info[:2]}\n{constraints}".encode()).hexdigest()[:16]
    folder = cache_dir / f"{tool.name}-{key}"

    def build(unfinished: Path) -> None:
        _install(unfinished, tool, constraints)
        # pip has written the interpreter's path into the scripts, and the folder is about to move.
        for script in (unfinished / _PYTHON).parent.iterdir():
            text = b"" if script.is_symlink() else script.read_bytes()
            if text.startswith(b"#!"):
                script.write_bytes(text.replace(bytes(unfinished), bytes(folder), 1))

    return cached_folder(folder, build) / _PYTHON


def _install(folder: Path, tool: Tool, constraints: str) -> None:
    pins = [line for line in constraints.splitlines() if line.strip() and not line.startswith((" ", "#"))]
    requirement = next(line for line in pins if line.startswith(f"{tool.package}==")).removesuffix(" \\")
    log.info("making an environment with %s; this happens once and takes some minutes", requirement)
    # The cache renames the folder when it is complete: its interpreter still works then, its scripts would not.
    venv.create(folder)
    file = folder / "constraints.txt"
    install = [sys.executable, "-m", "pip", "--python", str(folder / _PYTHON)]
    install += ["--disable-pip-version-check", "--no-input", "install", "--progress-bar=off"]
    progress = events.Progress(f"installing {requirement}", len(pins))
    collected: set[str] = set()
    if tool.locked:
        file.write_text(constraints, encoding="utf-8")
        torch = next(line.split()[1] for line in constraints.splitlines() if line.startswith("# torch=="))
        commands = [["--no-deps", torch], ["--no-deps", "--require-hashes", "--requirement", str(file)]]
    else:
        # Without the pin that is asked for: where it is not to be had, pip says no more than that two pins conflict.
        file.write_text("\n".join(pin for pin in pins if pin != requirement), encoding="utf-8")
        commands = [["--constraint", str(file), requirement]]
    for command in commands:
        _pip([*install, *command], tool, requirement.split()[0], progress, collected, len(pins))
    progress.update(len(pins))


def _pip(
    command: list[str], tool: Tool, requirement: str, progress: events.Progress, collected: set[str], packages: int
) -> None:
    """Run pip, show what it says, and count the packages that it collects."""
    tail: deque[str] = deque(maxlen=_LINES_SHOWN)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as pip:
        assert pip.stdout is not None  # noqa: S101 - PIPE was asked for
        for line in pip.stdout:
            if line.strip():
                tail.append(line.rstrip())
            print(line, end="", flush=True)
            if line.startswith(("Collecting ", "Processing ")):
                collected.add(line.split()[1])
                progress.update(min(len(collected), packages))
    if pip.returncode != 0:
        said = "\n".join(f"  {line}" for line in tail)
        raise SkdError(
            f"pip could not install {tool.title} (exit code {pip.returncode}):\n{said}",
            where=requirement,
            hint="check the network and which index pip uses: `python3 -m pip config list`",
        )
