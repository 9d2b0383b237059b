"""Triton on a CPU, by its interpreter: what vLLM's model runner V2 needs where there is no GPU.

Triton is kept in a folder of its own in the cache (0.8 GB), since a server that finds it runs differently. vLLM wants a
backend named `cpu`, and asks it nothing as long as the interpreter runs all kernels.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path

from skd_lib.storage.cache import cached_folder, default_cache_dir
from skd_lib.vllm import serve

_ENTRY_POINTS = "[triton.backends]\ncpu = interpreted_cpu\n"
_METADATA = "Metadata-Version: 2.1\nName: interpreted-cpu\nVersion: 1.0\n"
_COMPILER = """
from triton.backends.compiler import BaseBackend
class Unused(BaseBackend): pass
Unused.__abstractmethods__ = frozenset()
"""
_DRIVER = """
from triton.backends.driver import DriverBase
class Unused(DriverBase):
    @classmethod
    def is_active(cls): return False
Unused.__abstractmethods__ = frozenset()
"""


def variables() -> dict[str, str]:
    """Return the environment of a server on model runner V2; Triton is installed the first time.

    Raises:
        RuntimeError: pip cannot install it; with what pip says.
    """
    lock = Path(serve.__file__).with_name("lock-gpu.txt").read_text(encoding="utf-8")
    pin = re.search(r"^triton==(?:.*\\\n)*.*\n", lock, re.MULTILINE)
    assert pin is not None
    key = hashlib.sha256(f"{sys.version_info[:2]}\n{pin[0]}{_COMPILER}{_DRIVER}".encode()).hexdigest()[:16]
    folder = cached_folder(default_cache_dir() / f"triton-{key}", lambda path: _install(path, pin[0]))
    return {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")])),
        "TRITON_INTERPRET": "1",
        "VLLM_USE_V2_MODEL_RUNNER": "1",
    }


def _install(folder: Path, pin: str) -> None:
    requirements = folder / "requirements.txt"
    requirements.write_text(pin, encoding="utf-8")
    command = [sys.executable, "-m", "pip", "--no-input", "install", "--no-deps", "--require-hashes"]
    command += ["--progress-bar=off", "--target", str(folder), "--requirement", str(requirements)]
    pip = subprocess.run(command, capture_output=True, text=True)
    if pip.returncode != 0:
        raise RuntimeError(f"pip cannot install Triton: {pip.stderr.strip()}")
    backend, metadata = folder / "interpreted_cpu", folder / "interpreted_cpu-1.0.dist-info"
    backend.mkdir()
    metadata.mkdir()
    for file, text in {
        backend / "__init__.py": "",
        backend / "compiler.py": _COMPILER,
        backend / "driver.py": _DRIVER,
        metadata / "METADATA": _METADATA,
        metadata / "entry_points.txt": _ENTRY_POINTS,
    }.items():
        file.write_text(text, encoding="utf-8")
