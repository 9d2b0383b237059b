"""What makes a local run another one: its records in MLflow begin anew where steps do, and go on where those do."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from skd_lib.config import RunConfig
from skd_lib.data.manifest import data_fingerprint, digest
from skd_lib.models.references import model_fingerprint
from skd_lib.parameters import to_struct


def run_identity(config: RunConfig, code: Iterable[str], trials: Iterable[Mapping[str, Any]] = ()) -> str:
    """Hex sha256 of the configuration, the code, and the present content of data and models.

    What cannot be looked at counts as one content: preflight is about to tell.

    Args:
        config: The run, or what all runs of a comparison start from.
        code: Names of the images that steps run in, or the digest of the sources.
        trials: The runs of a comparison.
    """
    students = (trial.get("overrides", {}).get("student") for trial in trials)
    models = sorted({name for name in (config.teacher, config.student, *students) if name})
    return digest(
        {
            "config": to_struct(config),
            "code": sorted(set(code)),
            "data": _or_nothing(lambda: data_fingerprint(config.data)),
            "models": {name: _or_nothing(lambda name=name: model_fingerprint(name)) for name in models},
        }
    )


def _or_nothing(look: Callable[[], str]) -> str:
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # the hub's progress bars
            return look()
    except Exception:  # noqa: BLE001 - whatever it is, preflight meets it again and tells
        return ""
