"""`skd doctor --kubeflow`: what the cluster does to a run that its owner cannot see.

Whether a failed step is tried again is not only the pipeline's matter: the Workflow controller's ConfigMap holds a
default for every template, which the pipeline's own strategy (that names no policy) is merged with. Each rule here was
seen on Kubeflow Pipelines 2.17.0 with Argo 4.0.8.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import yaml

from skd_lib.doctor import Finding, Grade

CONTROLLER = "workflow-controller-configmap"
SECONDS = 10
REMEDY = (
    f"an administrator can set `limit: '0'` and `retryPolicy: Always` under workflowDefaults.spec.templateDefaults."
    f"retryStrategy in {CONTROLLER}, while no workflow runs: then a step has exactly the attempts of its profile. "
    "Not `Always` with another limit: it holds for every level of the graph, so that attempts multiply"
)
BY_POLICY: Mapping[str, str] = {
    "OnFailure": "a step that fails, runs out of memory or is evicted is tried again; one whose pod is deleted is not",
    "OnError": "a step that fails, runs out of memory or is evicted is NOT tried again; one whose pod is deleted is",
    "OnTransientError": "a step is tried again after transient errors of the cluster only",
    "Always": "a step is tried again however it failed",
}


def examine_kubeflow(namespace: str, read: Callable[[str], Mapping[str, str] | None] | None = None) -> list[Finding]:
    """Say whether Kubeflow tries failed steps again; nothing is said where that may not be read.

    Args:
        namespace: Where Kubeflow Pipelines is installed.
        read: Reads the data of the ConfigMap in a namespace, by default from the cluster that kubectl would ask.
    """
    data = (read or read_controller)(namespace)
    return [] if data is None else [retries(data)]


def retries(data: Mapping[str, str]) -> Finding:
    """Say what the Workflow controller's settings make of a step's retries.

    Args:
        data: The ConfigMap's.
    """
    strategy = _strategy(data)
    policy = str(strategy.get("retryPolicy") or "OnFailure")
    limit = str(strategy.get("limit", "0"))
    found = BY_POLICY.get(policy, f"retryPolicy {policy} is unknown here")
    if limit != "0" and policy in ("Always", "OnFailure"):
        found = f"every level of the graph is tried again {limit} times, not only steps: attempts multiply"
        return Finding("retries", Grade.WARN, found, REMEDY)
    good = policy in ("Always", "OnFailure")
    return Finding("retries", Grade.OK if good else Grade.WARN, found, "" if good else REMEDY)


def read_controller(namespace: str) -> Mapping[str, str] | None:
    """Return the data of the Workflow controller's ConfigMap; None where it may not be read, or there is no cluster."""
    try:
        from kubernetes import client, config
        from kubernetes.client.exceptions import ApiException
        from urllib3.exceptions import HTTPError
    except ImportError:
        return None
    settings = client.Configuration()
    settings.retries = 0
    try:
        config.load_config(client_configuration=settings)
        answer = client.CoreV1Api(client.ApiClient(settings)).read_namespaced_config_map(
            CONTROLLER, namespace, _request_timeout=SECONDS, _preload_content=False
        )
        data = json.loads(answer.data).get("data")
    except (ApiException, config.ConfigException, HTTPError, OSError, ValueError, AttributeError):
        return None
    return data if isinstance(data, dict) else {}


def _strategy(data: Mapping[str, str]) -> dict[str, Any]:
    """The retry strategy that every template gets; in an older form of the ConfigMap all settings are one text."""
    try:
        whole = yaml.safe_load(data.get("config") or "{}")
        defaults = yaml.safe_load(data.get("workflowDefaults") or "{}") or whole["workflowDefaults"]
        found = defaults["spec"]["templateDefaults"]["retryStrategy"]
    except (yaml.YAMLError, KeyError, TypeError, AttributeError):
        return {}
    return found if isinstance(found, dict) else {}
