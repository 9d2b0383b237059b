"""Fields that are others than a file says: `--set` of the command line, and the runs of a comparison."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from skd_lib._core.documents import parse_yaml
from skd_lib.errors import SkdError

Overrides = dict[str, Any]
"""Values by dotted field, e.g. `distill.sampling.top_k`; what is there is replaced as a whole."""


def parse_overrides(texts: Iterable[str]) -> Overrides:
    """What `--set FIELD=VALUE` says, with values in YAML; the last of a field counts.

    Raises:
        SkdError: one has no `=`, or its value is not YAML, see `skd_lib._core.documents`.
    """
    overrides: Overrides = {}
    for text in texts:
        path, equals, value = text.partition("=")
        where = f"--set {text}"
        if not equals or not path.strip():
            raise SkdError("not FIELD=VALUE", where=where, hint="e.g. --set distill.sampling.top_k=5")
        overrides[path.strip()] = parse_yaml(value, where=where)
    return overrides


def apply(values: dict[str, Any], overrides: Overrides, *, where: str) -> dict[str, Any]:
    """A configuration's plain values with some of them replaced; null takes one out.

    Raises:
        SkdError: a field's name leads into something that is no section.
    """
    changed = dict(values)
    for path, value in overrides.items():
        *sections, field = path.split(".")
        holder = changed
        for depth, section in enumerate(sections, 1):
            if value is None and holder.get(section) is None:
                break  # an empty section is not the same as none: `lora: {}` trains adapters
            inner = holder.get(section, {})
            if not isinstance(inner, dict):
                raise SkdError(
                    f"`{'.'.join(sections[:depth])}` has no fields",
                    where=f"{where}, field `{path}`",
                    hint="dotted names lead through sections; `skd config` lists all of them",
                )
            holder[section] = dict(inner)
            holder = holder[section]
        else:
            if value is None:
                holder.pop(field, None)
            else:
                holder[field] = value
    return changed
