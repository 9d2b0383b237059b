"""`skd doctor --kubeflow`: settings of a cluster that decide about a run and that its owner cannot see.

Not the pipeline alone decides whether a failed step is tried again: the Workflow controller's ConfigMap holds a default
for every template, with which the pipeline's own strategy (that names no policy) is merged. Each rule here was seen on
Kubeflow Pipelines 2.17.0 with Argo 4.0.8.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import yaml

from skd_lib.errors import SkdError
from skd_lib.preflight.checks import Check

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


class _Unclear(SkdError):
    """A cluster answers, and does not show its settings."""


def check_retries(namespace: str, read: Callable[[str], Mapping[str, str]] | None = None) -> Check:
    """Say whether Kubeflow tries failed steps again, or why that cannot be seen.

    Args:
        namespace: The namespace of Kubeflow Pipelines.
        read: Reads the data of the ConfigMap in a namespace, by default from the cluster that kubectl would ask.
    """
    try:
        return retries((read or read_controller)(namespace))
    except SkdError as error:
        return Check("cluster", "warning" if isinstance(error, _Unclear) else "error", error.what, hint=error.hint)


def retries(data: Mapping[str, str]) -> Check:
    """Say how the data of the Workflow controller's ConfigMap affect a step's retries."""
    strategy = _strategy(data)
    policy = str(strategy.get("retryPolicy") or "OnFailure")
    limit = str(strategy.get("limit", "0"))
    found = BY_POLICY.get(policy, f"retryPolicy {policy} is unknown here")
    good = policy in ("Always", "OnFailure")
    if good and limit != "0":
        good = False
        found = f"every level of the graph is tried again {limit} times, not only steps: attempts multiply"
    return Check("retries", "ok" if good else "warning", found, hint="" if good else REMEDY)


def read_controller(namespace: str) -> Mapping[str, str]:
    """Return the data of the Workflow controller's ConfigMap.

    Raises:
        SkdError: there is no cluster, it cannot be reached, or it does not show the ConfigMap.
    """
    try:
        from kubernetes import client, config
        from kubernetes.client.exceptions import ApiException
        from urllib3.exceptions import HTTPError
    except ImportError as error:
        raise _Unclear("the package kubernetes is missing", hint="pip install kubernetes") from error
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
        name = f"ConfigMap {CONTROLLER} in namespace {namespace}"
        if error.status == 404:
            hint = "name the namespace of Kubeflow Pipelines with --namespace"
            raise _Unclear(f"there is no {name}", hint=hint) from error
        what = f"{name} may not be read (HTTP {error.status or 0}): whether steps are tried again is open"
        hint = "ask an administrator to run this, or for the right to read it"
        raise _Unclear(what, hint=hint) from error
    except config.ConfigException as error:
        raise SkdError("this machine knows none: there is no usable kubeconfig", hint=NO_CLUSTER) from error
    except (HTTPError, OSError) as error:
        hint = "see whether `kubectl get namespaces` answers, then run this again"
        raise SkdError(f"cannot be reached: {_cause(error)}", hint=hint) from error
    except (yaml.YAMLError, ValueError, TypeError, AttributeError) as error:
        what = "what answers is not Kubernetes, or the kubeconfig cannot be read"
        raise SkdError(what, hint=NO_CLUSTER) from error
    return data if isinstance(data, dict) else {}


def _cause(error: BaseException) -> str:
    """Return the operating system's words (`Connection refused`), which urllib3 wraps several times."""
    while isinstance(inner := getattr(error, "reason", None) or error.__cause__, BaseException):
        error = inner
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def _strategy(data: Mapping[str, str]) -> dict[str, Any]:
    """Return the retry strategy that every template gets; an older form of the ConfigMap holds all settings in one."""
    try:
        whole = yaml.safe_load(data.get("config") or "{}")
        defaults = yaml.safe_load(data.get("workflowDefaults") or "{}") or whole["workflowDefaults"]
        found = defaults["spec"]["templateDefaults"]["retryStrategy"]
    except (yaml.YAMLError, KeyError, TypeError, AttributeError):
        return {}
    return found if isinstance(found, dict) else {}
