"""Decide what a local run may reuse: the steps of the run before, by kfp's cache keys, and its records in MLflow.

The image's name is part of every cache key. Where steps are child processes, the image is this source tree, and its
name becomes the tree's digest, so that changed code runs again.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import skd_lib
from skd_kfp.pipelines.compiling import set_image
from skd_lib.comparison.trials import Trial
from skd_lib.config import RunConfig
from skd_lib.config.parameters import to_struct
from skd_lib.data.prepared import data_fingerprint, digest
from skd_lib.models.references import model_fingerprint
from skd_lib.steps.kfp_call import OUTPUT_FILE, OUTPUT_FILE_OPTION
from skd_lib.storage.transfers import DEADLINE_VARIABLE

Identity = Mapping[str, str]
PATIENCE = "10"
"""Seconds for one request to object storage; preflight waits longer."""


def source_digest() -> str:
    """Return the digest of the library's source files."""
    root = Path(skd_lib.__file__).parent
    found = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        found.update(str(path.relative_to(root)).encode())
        found.update(path.read_bytes())
    return found.hexdigest()


def local_pipeline(documents: list[dict[str, Any]], images: Mapping[str, str] | None = None) -> list[dict[str, Any]]:
    """Return a compiled pipeline as this machine runs it.

    Retries are left out: on one machine a person reads the error, corrects it and runs again. Where steps are
    containers `images` says what to run for an image, by the pipeline's name for it.
    """
    local = json.loads(json.dumps(documents))
    source = f"local-python/skd:{source_digest()[:16]}"
    spec = local[0]
    for container in _containers(spec):
        set_image(container, source if images is None else images.get(container["image"], container["image"]))
        container["args"] = [*container.get("args", []), OUTPUT_FILE_OPTION, OUTPUT_FILE]
    for component in [spec["root"], *spec["components"].values()]:
        for task in component.get("dag", {}).get("tasks", {}).values():
            task.pop("retryPolicy", None)
    return list(local)


def run_identity(config: RunConfig, spec: Mapping[str, Any], trials: Iterable[Mapping[str, Any]] = ()) -> Identity:
    """Return the digests of configuration and code, and of the present content of data and models.

    A run with another identity has new records in MLflow; a run with the same identity continues the records. What
    cannot be read now is empty: preflight reports it. The images of `spec`, which `local_pipeline` returns, stand for
    the code.
    """
    rounds = {Trial.model_validate(trial).label: trial for trial in trials}
    students = (trial.get("overrides", {}).get("student") for trial in rounds.values())
    models = sorted({name for name in (config.teacher, config.student, *students) if name})
    return {
        "config": digest(to_struct(config)),
        "code": digest(sorted({container["image"] for container in _containers(spec)})),
        "data": _or_nothing(partial(data_fingerprint, config.data)),
        **{f"model {name}": _or_nothing(partial(model_fingerprint, name)) for name in models},
        **{f"trial {label}": digest(trial) for label, trial in rounds.items()},
    }


def is_same(known: Identity, now: Identity) -> bool:
    """Return whether nothing is known to have changed: a trial or model that is added or removed changes no others."""
    return bool(known) and all(now[name] in ("", text) for name, text in known.items() if text and name in now)


def _containers(spec: Mapping[str, Any]) -> list[dict[str, Any]]:
    executors = spec["deploymentSpec"]["executors"].values()
    return [executor["container"] for executor in executors if "container" in executor]


def _or_nothing(read: Callable[[], str]) -> str:
    before = os.environ.get(DEADLINE_VARIABLE)
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # the hub's progress bars
            os.environ[DEADLINE_VARIABLE] = PATIENCE
            return read()
    except Exception:  # noqa: BLE001 - whatever it is, preflight meets it again and reports it
        return ""
    finally:
        del os.environ[DEADLINE_VARIABLE]
        if before is not None:
            os.environ[DEADLINE_VARIABLE] = before
