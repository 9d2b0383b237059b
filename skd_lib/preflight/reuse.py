"""From which run on later ones take finished steps out of Kubeflow's cache.

The cache does not see that files were deleted. A run without reuse therefore gives its steps a text that no earlier run
had (`StepConfig.fresh`), and later runs with the same data must give them the same one, to find what it made, and not
what was made before. It is kept beside the checkpoints.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from pathlib import Path

from skd_lib import storage
from skd_lib.errors import SkdError
from skd_lib.preflight.checks import Check

FOLDER = "reuse-from"
"""Folder under the root of all checkpoints, with a file for each preparation of data."""


def reuse_from(checkpoint_root: str, preparation: str, new: str) -> tuple[str, list[Check]]:
    """Return the text for `StepConfig.fresh`, and what is to be said about it.

    Args:
        checkpoint_root: Where it is kept; empty: nowhere.
        preparation: `--config` of prepare_data without it: all other steps that are cached need that step's data.
        new: This run's own text, which is then kept; empty: the one that is kept, empty if there is none.
    """
    if not checkpoint_root:
        hint = "give the namespace a `checkpoint-root` (ConfigMap `skd-settings`), where this run's outputs are noted"
        what = "later runs take what was made before this one again, unless they have `reuse` false, too"
        return new, [Check("reuse", "warning", what, hint=hint)] if new else []
    name = hashlib.sha256(preparation.encode()).hexdigest()
    uri = f"{checkpoint_root.rstrip('/')}/{FOLDER}/{name}.json"
    try:
        if not new:
            return _read(uri), []
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "new.json"
            file.write_text(json.dumps({"fresh": new}), encoding="utf-8")
            storage.upload(file, uri)
    except SkdError as error:
        what = f"it cannot be {'noted' if new else 'read'} from which run on steps are reused: {error.what}"
        hint = "give later runs `reuse` false, too" if new else "delete the file, or run with `reuse` false"
        return new, [Check("reuse", "warning", what, uri, hint)]
    return new, []


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
