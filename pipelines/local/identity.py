"""What makes a local run another one: its records in MLflow begin again where steps do, and go on where those do."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

from skd_lib.comparison.trials import Trial
from skd_lib.config import RunConfig
from skd_lib.config.parameters import to_struct
from skd_lib.data.manifest import data_fingerprint, digest
from skd_lib.models.references import model_fingerprint
from skd_lib.storage.transfers import DEADLINE_VARIABLE

Identity = Mapping[str, str]
PATIENCE = "10"
"""Seconds a request to object storage is tried for: preflight has more."""


def run_identity(config: RunConfig, code: Iterable[str], trials: Iterable[Mapping[str, Any]] = ()) -> Identity:
    """Digests of the configuration, the code, and the present content of data and models.

    Args:
        config: The run, or what all runs of a comparison start from.
        code: Names of the images that steps run in, or the digest of the sources.
        trials: The runs of a comparison.

    Returns:
        The digests by what they are of; empty for what cannot be looked at, of which preflight tells.
    """
    rounds = {Trial.model_validate(trial).label: trial for trial in trials}
    students = (trial.get("overrides", {}).get("student") for trial in rounds.values())
    models = sorted({name for name in (config.teacher, config.student, *students) if name})
    return {
        "config": digest(to_struct(config)),
        "code": digest(sorted(set(code))),
        "data": _or_nothing(partial(data_fingerprint, config.data)),
        **{f"model {name}": _or_nothing(partial(model_fingerprint, name)) for name in models},
        **{f"trial {label}": digest(trial) for label, trial in rounds.items()},
    }


def is_same(known: Identity, now: Identity) -> bool:
    """Whether nothing is known to have changed: a trial or a model that has come or gone changes no other's records."""
    return bool(known) and all(now[name] in ("", text) for name, text in known.items() if text and name in now)


def _or_nothing(look: Callable[[], str]) -> str:
    before = os.environ.get(DEADLINE_VARIABLE)
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # the hub's progress bars
            os.environ[DEADLINE_VARIABLE] = PATIENCE
            return look()
    except Exception:  # noqa: BLE001 - whatever it is, preflight meets it again and tells
        return ""
    finally:
        del os.environ[DEADLINE_VARIABLE]
        if before is not None:
            os.environ[DEADLINE_VARIABLE] = before
