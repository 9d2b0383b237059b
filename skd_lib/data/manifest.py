"""What the prepared data is: counts, checksums, and fingerprints that change when the data does."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from skd_lib.config import DataConfig, FilesSource
from skd_lib.data import sources
from skd_lib.data.splits import Splits

NAME = "manifest.json"
FORMAT = 1


def data_fingerprint(config: DataConfig) -> str:
    """Hex sha256 of the source's present content and of how it is prepared, without preparing it.

    It reads local files, but asks only for the checksums of remote ones: cheap enough to be a cache key that is
    computed before every run.

    Raises:
        SkdError: a file is missing, or storage or the hub cannot be asked.
    """
    return digest({**_content(config), "preparation": preparation(config)})


def build(
    config: DataConfig,
    *,
    seed: int,
    rows: Mapping[str, int],
    sha256: Mapping[str, str],
    splits: Splits,
    missing: Mapping[str, str],
) -> dict[str, Any]:
    """The manifest of prepared data.

    Args:
        config: How it was prepared.
        seed: Seed of the splits.
        rows: Number of rows by split.
        sha256: Checksum by file name.
        splits: What was dropped: `dropped` and `losses`.
        missing: Held-out sets that could not be read, and why.

    Returns:
        A JSON object; its `fingerprint` covers the source, the preparation, the seed and the rows themselves.
    """
    content = {**_content(config), "preparation": preparation(config), "seed": seed, "sha256": dict(sha256)}
    return {
        "format": FORMAT,
        "fingerprint": digest(content),
        "rows": dict(rows),
        "dropped": {reason: count for reason, count in splits.dropped.items() if count},
        "losses": {name: loss.to_dict() for name, loss in splits.losses.items()},
        "missing": dict(missing),
        **content,
        "config": _described(config),
    }


def preparation(config: DataConfig) -> dict[str, Any]:
    """The part of the configuration that decides which rows come out of given content; locations do not."""
    values: dict[str, Any] = config.model_dump(mode="json")
    if isinstance(config.source, FilesSource):
        # Which file belongs to which split is told by `sources.identify`, with the file's checksum.
        for split in ("train", "validation", "test"):
            del values["source"][split]
    # Likewise; and how a set is asked and judged changes no row of it.
    for held_out in values["held_out"]:
        del held_out["task"]
        held_out["source"].pop("files", None)
    if not values["held_out"]:
        del values["held_out"]
    return values


def _described(config: DataConfig) -> dict[str, Any]:
    """The configuration for later steps; of held-out sets' tasks what was given, for the rest is the run's."""
    values: dict[str, Any] = config.model_dump(mode="json")
    for held_out, described in zip(config.held_out, values["held_out"], strict=True):
        # Without its name, which may be that of a file that is not there.
        described["task"] = held_out.task.model_dump(mode="json", exclude_unset=True, exclude={"name"})
    return values


def _content(config: DataConfig) -> dict[str, Any]:
    """What identifies the sources' present content."""
    held_out = {each.name: sources.identify_held_out(each) for each in config.held_out}
    return {"source": sources.identify(config.source), **({"held_out": held_out} if held_out else {})}


def digest(value: Any) -> str:
    """Hex sha256 of a JSON value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
