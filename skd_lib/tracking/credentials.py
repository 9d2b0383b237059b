"""Who a step is to MLflow, where Kubeflow's own MLflow integration has credentials of its own in the same container.

KFP 2.17's integration (`plugins.mlflow`) puts the credentials of its server into the variables that MLflow's client
reads, and its launcher, which runs in the step's container, uses them. So a Secret of ours must not fill the same
variables, and what they hold must not be sent to another server.
"""

from __future__ import annotations

import json
import os
from urllib.parse import urlsplit

_OWN = {
    "SKD_MLFLOW_USERNAME": "MLFLOW_TRACKING_USERNAME",
    "SKD_MLFLOW_PASSWORD": "MLFLOW_TRACKING_PASSWORD",
    "SKD_MLFLOW_TOKEN": "MLFLOW_TRACKING_TOKEN",
}
"""MLflow's variable by ours."""
_WHO = (*_OWN.values(), "MLFLOW_TRACKING_AUTH")
_WORKSPACE = "MLFLOW_WORKSPACE"
_INTEGRATION = "KFP_MLFLOW_CONFIG"
"""Set by KFP's integration (`EnvMLflowConfig` in backend/src/common/plugins/mlflow): JSON with its server's address."""
_PORTS = {"http": 80, "https": 443}


def use_credentials(tracking_uri: str) -> None:
    """Leave in this process's environment the credentials for one server; other processes are not touched.

    Args:
        tracking_uri: The server.
    """
    own = {name: value for variable, name in _OWN.items() if (value := os.environ.get(variable))}
    endpoint = _endpoint()
    foreign = bool(endpoint) and _server(endpoint) != _server(tracking_uri)
    for name in _WHO if own or foreign else ():
        os.environ.pop(name, None)
    if foreign:
        os.environ.pop(_WORKSPACE, None)
    os.environ.update(own)


def _endpoint() -> str:
    try:
        config = json.loads(os.environ.get(_INTEGRATION) or "{}")
    except ValueError:
        return ""
    return str(config.get("endpoint") or "") if isinstance(config, dict) else ""


def _server(uri: str) -> tuple[str, str, int | None, str]:
    try:
        parts = urlsplit(uri)
        return parts.scheme, parts.hostname or "", parts.port or _PORTS.get(parts.scheme), parts.path.rstrip("/")
    except ValueError:  # no URL
        return "", uri, None, ""
