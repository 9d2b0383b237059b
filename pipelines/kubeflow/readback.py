"""Whether the server keeps what it was asked for: a creation is answered before that is known."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def run_differences(wanted: Any, kept: Any) -> list[str]:
    """Return what of a run the server keeps differently, in words; what it chose where nothing was asked is none."""
    asked, has = wanted.runtime_config, _field(kept, "runtime_config")
    parameters: Mapping[str, Any] = _field(has, "parameters") or {}
    changed = sorted(
        name for name, value in asked.parameters.items() if name not in parameters or parameters[name] != value
    )
    version = ("pipeline_version_reference", "pipeline_version_id")
    return [
        *(["its pipeline"] if _field(kept, *version) != _field(wanted, *version) else []),
        *([f"its parameters {', '.join(changed)}"] if changed else []),
        *(
            ["where artifacts go"]
            if asked.pipeline_root and _field(has, "pipeline_root") != asked.pipeline_root
            else []
        ),
        *(["its service account"] if wanted.service_account and kept.service_account != wanted.service_account else []),
    ]


def recurring_differences(wanted: Any, kept: Any) -> list[str]:
    """Return what of a recurring run the server keeps differently, in words."""
    cron = ("trigger", "cron_schedule", "cron")
    return [
        *(["its schedule"] if _field(kept, *cron) != _field(wanted, *cron) else []),
        *(["being switched off"] if kept.mode == "DISABLE" else []),
        *run_differences(wanted, kept),
    ]


def _field(value: Any, *names: str) -> Any:
    """A field of a field, None where one of them is missing."""
    for name in names:
        value = getattr(value, name, None)
    return value
