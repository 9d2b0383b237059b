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

from skd_lib.preflight.machine import Finding, Grade

CONTROLLER = "workflow-controller-configmap"
SECONDS = 10
REMEDY = (
    f"an administrator can set `limit: '0'` and `retryPolicy: Always` under workflowDefaults.spec.templateDefaults."
    f"retryStrategy in {CONTROLLER}, while no workflow runs: then a step has exactly the attempts of its profile. "
    "Not `Always` with another limit: it holds for every level of the graph, so that attempts multiply"
)
NO_CLUSTER = (
    "`kubectl config current-context` has to name your cluster (on GKE: `gcloud container clusters get-credentials`); "
    "the kubeconfig is ~/.kube/config, or what KUBECONFIG names"
)
BY_POLICY: Mapping[str, str] = {
    "OnFailure": "a step that fails, runs out of memory or is evicted is tried again; one whose pod is deleted is not",
    "OnError": "a step that fails, runs out of memory or is evicted is NOT tried again; one whose pod is deleted is",
    "OnTransientError": "a step is tried again after transient errors of the cluster only",
    "Always": "a step is tried again however it failed",
}


class _Unread(Exception):
    """The cluster's settings could not be read; says why."""

    def __init__(self, grade: Grade, found: str, advice: str) -> None:
        self.finding = Finding("cluster", grade, found, advice)


def examine_kubeflow(namespace: str, read: Callable[[str], Mapping[str, str]] | None = None) -> list[Finding]:
    """Say whether Kubeflow tries failed steps again, or why that could not be seen.

    Args:
        namespace: Where Kubeflow Pipelines is installed.
        read: Reads the data of the ConfigMap in a namespace, by default from the cluster that kubectl would ask.
    """
    try:
        return [retries((read or read_controller)(namespace))]
    except _Unread as unread:
        return [unread.finding]


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


def read_controller(namespace: str) -> Mapping[str, str]:
    """Return the data of the Workflow controller's ConfigMap.

    Raises:
        _Unread: there is no cluster, it cannot be reached, or it does not show the ConfigMap.
    """
    try:
        from kubernetes import client, config
        from kubernetes.client.exceptions import ApiException
        from urllib3.exceptions import HTTPError
    except ImportError as error:
        raise _Unread(Grade.WARN, "the package kubernetes is missing", "pip install kubernetes") from error
    settings = client.Configuration()
    settings.retries = 0
    try:
        try:  # not `load_config`, which prints a note of its own where there is no kubeconfig
            config.load_kube_config(client_configuration=settings)
        except config.ConfigException:
            config.load_incluster_config(client_configuration=settings)
        answer = client.CoreV1Api(client.ApiClient(settings)).read_namespaced_config_map(
            CONTROLLER, namespace, _request_timeout=SECONDS, _preload_content=False
        )
        data = json.loads(answer.data).get("data")
    except ApiException as error:
        raise _refused(error.status or 0, namespace) from error
    except config.ConfigException as error:
        raise _Unread(Grade.FAIL, "this machine knows none: there is no usable kubeconfig", NO_CLUSTER) from error
    except (HTTPError, OSError) as error:
        advice = "see whether `kubectl get namespaces` answers, then run this again"
        raise _Unread(Grade.FAIL, f"cannot be reached: {_cause(error)}", advice) from error
    except (yaml.YAMLError, ValueError, TypeError, AttributeError) as error:
        found = "what answers is not Kubernetes, or the kubeconfig cannot be read"
        raise _Unread(Grade.FAIL, found, NO_CLUSTER) from error
    return data if isinstance(data, dict) else {}


def _cause(error: BaseException) -> str:
    """What the operating system said (`Connection refused`), which urllib3 wraps several times."""
    while isinstance(inner := getattr(error, "reason", None) or error.__cause__, BaseException):
        error = inner
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def _refused(status: int, namespace: str) -> _Unread:
    name = f"ConfigMap {CONTROLLER} in namespace {namespace}"
    if status == 404:
        advice = "name the namespace of Kubeflow Pipelines with --namespace"
        return _Unread(Grade.WARN, f"there is no {name}", advice)
    advice = "ask an administrator to run this, or for the right to read it"
    return _Unread(Grade.WARN, f"{name} may not be read (HTTP {status}): whether steps are tried again is open", advice)


def _strategy(data: Mapping[str, str]) -> dict[str, Any]:
    """The retry strategy that every template gets; in an older form of the ConfigMap all settings are one text."""
    try:
        whole = yaml.safe_load(data.get("config") or "{}")
        defaults = yaml.safe_load(data.get("workflowDefaults") or "{}") or whole["workflowDefaults"]
        found = defaults["spec"]["templateDefaults"]["retryStrategy"]
    except (yaml.YAMLError, KeyError, TypeError, AttributeError):
        return {}
    return found if isinstance(found, dict) else {}
