"""The interpreter that has COMET: this one in COMET's image, elsewhere a virtual environment made when first needed."""

from __future__ import annotations

import importlib.metadata
import os
import sys
from pathlib import Path

from skd_lib.errors import SkdError
from skd_lib.storage.cache import default_cache_dir
from skd_lib.storage.environments import Tool, make_environment

COMET = Tool("comet", "COMET", "unbabel-comet")
CONSTRAINTS = Path(__file__).with_name("constraints.txt")
"""The pinned packages of that environment."""

_NEWEST_PYTHON = (3, 12)  # the last for which numpy < 2 has wheels


def comet_python() -> Path:
    """Return the interpreter that has COMET; outside a cluster the environment for it is made where there is none."""
    if any(importlib.metadata.distributions(name=COMET.package)):
        return Path(sys.executable)
    if "KUBERNETES_SERVICE_HOST" in os.environ:
        raise SkdError(
            "this container has no COMET, and containers install nothing while they run",
            hint="run the step in the image `comet`, see images/README.md",
        )
    if sys.version_info[:2] > _NEWEST_PYTHON:
        newest = ".".join(map(str, _NEWEST_PYTHON))
        raise SkdError(f"COMET needs Python {newest} or older", hint=f"make this environment with Python {newest}")
    return make_environment(COMET, CONSTRAINTS.read_text(encoding="utf-8"), default_cache_dir())
