"""Reuse of finished steps from Kubeflow's cache after a run that took nothing from it.

The cache does not see that files were deleted. So a run without reuse gives its steps a text that no earlier run had
(`StepConfig.fresh`), and later runs with the same data give them the same text, to find this run's outputs, no older
ones. Step `prepare_data` keeps the text with the checkpoints when it has made its data: a run that made nothing
changes nothing. The cache is one for each pipeline and namespace, and so is the text.
"""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from pathlib import Path
from typing import Literal

from pydantic import TypeAdapter

from skd_lib import storage
from skd_lib._core import events
from skd_lib.errors import SkdError
from skd_lib.preflight.checks import Check

_TEXT = TypeAdapter(dict[str, str])
FOLDER = "reuse-from"
"""Folder under the root of all checkpoints, with a file for each preparation of data."""
NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
"""File in which Kubernetes names a pod's namespace."""
_FRESH = re.compile(r"([0-9a-f]{32}):.+")
"""The name of the file, and the run whose outputs later runs take."""


def reuse_from(
    checkpoint_root: str, preparation: str, new: str, *, kind: Literal["run", "comparison"]
) -> tuple[str, list[Check]]:
    """Return the text for `StepConfig.fresh`, and findings about it.

    Args:
        checkpoint_root: Folder that keeps the text; empty: none.
        preparation: `--config` of prepare_data without the text: all other cached steps need that step's data.
        new: Names this run, which takes nothing from the cache; empty: use the text that is kept, if there is one.
        kind: The kind of pipeline.
    """
    namespace = NAMESPACE.read_text(encoding="utf-8").strip() if NAMESPACE.is_file() else ""
    name = hashlib.sha256(json.dumps([preparation, kind, namespace]).encode()).hexdigest()[:32]
    if new and not checkpoint_root:
        hint = "give the namespace a `checkpoint-root` (ConfigMap `skd-settings`), where this run's outputs are noted"
        what = "later runs take what was made before this one again, unless they have `reuse` false, too"
        return f"{name}:{new}", [Check("reuse", "warning", what, hint=hint)]
    if new:
        return f"{name}:{new}", []
    if not checkpoint_root:
        return "", []
    uri = _uri(checkpoint_root, name)
    try:
        return _read(uri), []
    except SkdError as error:
        what = f"it cannot be read from which run on steps are reused: {error.what}"
        return "", [Check("reuse", "warning", what, uri, "delete the file, or run with `reuse` false")]


def keep(checkpoint_root: str, fresh: str) -> None:
    """Keep the text of `reuse_from`, so that later runs take this run's outputs; a failure is a warning.

    Args:
        checkpoint_root: Folder that keeps the text; empty: none.
        fresh: The text; any other is ignored.
    """
    found = _FRESH.fullmatch(fresh)
    if not found or not checkpoint_root:
        return
    uri = _uri(checkpoint_root, found[1])
    try:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "new.json"
            file.write_text(json.dumps({"fresh": fresh}), encoding="utf-8")
            storage.upload(file, uri)
    except SkdError as error:
        what = f"it cannot be noted from which run on steps are reused: {error.what}"
        events.note(SkdError(what, where=uri, hint="give later runs `reuse` false, too").line)


def _uri(checkpoint_root: str, name: str) -> str:
    return f"{checkpoint_root.rstrip('/')}/{FOLDER}/{name}.json"


def _read(uri: str) -> str:
    if not storage.exists(uri):
        return ""
    try:
        return _TEXT.validate_json(storage.read_bytes(uri))["fresh"]
    except (ValueError, KeyError) as error:
        raise SkdError("it holds something else", where=uri) from error
