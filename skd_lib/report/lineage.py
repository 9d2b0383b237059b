"""Where a run's student came from, in words for the page."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from skd_lib.models.fingerprint import short
from skd_lib.tracking.locate import IMAGE_VARIABLE

_NAMES = {
    "teacher": "teacher",
    "teacher_fingerprint": "teacher fingerprint",
    "base_student": "student",
    "base_student_fingerprint": "student fingerprint",
    "method": "method",
    "divergence": "divergence",
    "beta": "beta",
    "top_k": "top_k",
    "gamma": "gamma",
    "on_policy_fraction": "on_policy_fraction",
    "data_fingerprint": "data fingerprint",
    "teacher_weights_sha256": "teacher weights",
    "initial_weights_sha256": "student weights before",
    "weights_sha256": "student weights after",
    "precision": "precision",
    "code_version": "code version",
    "pipeline_run_id": "trained in pipeline run",
}
_MODEL_FINGERPRINTS = ("teacher fingerprint", "student fingerprint")
_PACKAGES = ("skd-lib", "torch", "transformers")


def lineage(record: Mapping[str, Any]) -> dict[str, str]:
    """Return the student's lineage in words, with image and versions: those of its training, or else this process's.

    Args:
        record: The lineage in the student's record (`skd_lib.models.records`).
    """
    told = {name: str(record[key]) for key, name in _NAMES.items() if record.get(key) not in (None, "")}
    told |= {name: short(text) for name, text in told.items() if name in _MODEL_FINGERPRINTS}
    if image := record.get("image") or os.environ.get(IMAGE_VARIABLE):
        told["image"] = str(image)
    return {**told, "software": str(record.get("software") or software())}


def software() -> str:
    """Return the versions of what this process runs on."""
    found = [f"Python {platform.python_version()}"]
    for package in _PACKAGES:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:  # run from a source tree, or without the extra
            continue
    return ", ".join(found)
