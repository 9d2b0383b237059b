"""From which run on later ones take finished steps out of Kubeflow's cache.

The cache does not see that files were deleted. A run without reuse therefore gives its steps a text that no earlier run
had (`StepConfig.fresh`), and later runs with the same data must give them the same one, to find what it made, and not
what was made before. Step `prepare_data` keeps it beside the checkpoints when it has made its data: a run that made
nothing leaves the note as it is. The cache is one for each pipeline and namespace, and so is the note.
"""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from pathlib import Path
from typing import Literal

from skd_lib import storage
from skd_lib._core import events
from skd_lib.errors import SkdError
from skd_lib.preflight.checks import Check

FOLDER = "reuse-from"
"""Folder under the root of all checkpoints, with a file for each preparation of data."""
NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
"""Where Kubernetes says in which namespace a pod is."""
_FRESH = re.compile(r"([0-9a-f]{32}):.+")
"""The note's name, and the run that made what later ones take."""


def reuse_from(
    checkpoint_root: str, preparation: str, new: str, *, kind: Literal["run", "comparison"]
) -> tuple[str, list[Check]]:
    """Return the text for `StepConfig.fresh`, and what is to be said about it.

    Args:
        checkpoint_root: Where it is kept; empty: nowhere.
        preparation: `--config` of prepare_data without it: all other steps that are cached need that step's data.
        new: Names this run, which takes nothing from the cache; empty: the text that is kept, empty if there is none.
        kind: Of the pipeline.
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
    """Note that later runs take what this one has made; where that fails, a warning says so.

    Args:
        checkpoint_root: Where it is kept; empty: nowhere.
        fresh: Text that `reuse_from` has made; with another one nothing is noted.
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
        kept = json.loads(storage.read_bytes(uri))["fresh"]
    except (ValueError, KeyError, TypeError) as error:
        raise SkdError("it holds something else", where=uri) from error
    if not isinstance(kept, str):
        raise SkdError("it holds something else", where=uri)
    return kept
