"""Which versions of Kubeflow Pipelines this project holds on, and what the server says it is."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from skd_lib.errors import SkdError

Version = tuple[int, int, int]

OLDEST: Version = (2, 15, 0)
"""Secrets and ConfigMaps are optional from here on; before, a step whose Secret is missing waits for ever."""
NEWEST: Version = (2, 17, 0)
"""The newest that this project was run on."""
SCHEDULES_LOSE_PARAMETERS: Version = (2, 17, 0)
"""After this one, where a plugin (MLflow) is set up, a schedule's runs may start without their parameters
(kubeflow/pipelines#13940); what the API tells of the schedule still holds them."""


def text(version: Version) -> str:
    """A version as people write it."""
    return ".".join(map(str, version))


def read_version(healthz: Mapping[str, Any]) -> Version | None:
    """Return the version in the answer to `/apis/v2beta1/healthz`; None where it does not say.

    The API server calls it `tag_name`, and the page's server, which answers in its place behind the dashboard,
    `apiServerTagName`; one that was built from source says "unknown".
    """
    said = healthz.get("tag_name") or healthz.get("apiServerTagName")
    found = re.match(r"v?(\d+)\.(\d+)\.(\d+)", str(said or ""))
    return (int(found[1]), int(found[2]), int(found[3])) if found else None


def check_version(version: Version | None, host: str) -> str:
    """Check that the pipelines hold on a server.

    Returns:
        What a person should know of it; empty where there is nothing.

    Raises:
        SkdError: the server is too old.
    """
    if version is None:
        return f"the server does not say its version: {text(OLDEST)} or newer is needed, {text(NEWEST)} was tried"
    if version < OLDEST:
        raise SkdError(
            f"the server is Kubeflow Pipelines {text(version)}: {text(OLDEST)} or newer is needed",
            where=host,
            hint="before it, steps wait for ever for Secrets and ConfigMaps that need not exist; upgrade the server",
        )
    if version > NEWEST:
        return f"the server is Kubeflow Pipelines {text(version)}, newer than {text(NEWEST)}, the newest that was tried"
    return ""


def schedule_notice(version: Version | None) -> str:
    """What a person should know of recurring runs on a server; empty where there is nothing."""
    if version is not None and version <= SCHEDULES_LOSE_PARAMETERS:
        return ""
    which = f"Kubeflow Pipelines {text(version)}" if version else "this version of Kubeflow Pipelines, which is unknown"
    return (
        f"{which} may start the runs of a schedule without their parameters where its MLflow plugin is set up "
        "(kubeflow/pipelines#13940): look at the parameters of the first run"
    )
