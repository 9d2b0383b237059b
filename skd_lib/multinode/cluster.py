"""Requests to Kubernetes about a `TrainJob` or pods, each repeated while the API server is away."""

from __future__ import annotations

import json
import logging
import os
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import urllib3
from kubernetes import client, config
from kubernetes.client.exceptions import ApiException

from skd_lib._core.machine import POD_VARIABLE
from skd_lib.errors import SkdError, Transient
from skd_lib.multinode.manifest import GROUP, NODE, PLURAL, RUN_LABEL, SERVER, VERSION, run_label

log = logging.getLogger(__name__)
_NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
_TIMEOUT = (5, 30)
"""Seconds to connect, and to wait for an answer."""
_LOG_SILENCE = 120
"""Seconds without a line after which a log is asked for again: a connection may be dead unnoticed."""
_AWAY = {0, 408, 429, 500, 502, 503, 504}
_LONGEST_PAUSE = 30.0
_NO_RIGHT = re.compile(r'User "[^"]*" cannot ')
"""Answer of the API server to an account that lacks a right. Quotas and webhooks refuse with 403 too: Trainer's does
where the runtime is not there."""
_UNASKED = "does not support dry run"
"""Answer of the API server to a dry run where a webhook may do more than look."""
ROLE_HINT = (
    "give the steps' service account the role of pipelines/deploy/multinode in this namespace: trainjobs "
    "get, list, create and delete; pods get and list; pods/log get"
)
SERVERS_HINT = (
    "give the steps' service account the role of pipelines/deploy/engine in this namespace: pods get, list, create and "
    "delete; secrets create and delete; pods/log get"
)
RUNTIME_HINT = (
    "see `multinode` in the config: `trainer_version` must be the cluster's, and `runtime` must be there; `kubectl "
    "apply -n NAMESPACE -k pipelines/deploy/multinode` makes the default one"
)


@dataclass(frozen=True)
class JobState:
    """The phase of a job, Kubernetes' words for it, and its age in seconds.

    Phases are `running` until it has ended (waiting and suspended included), `complete`, `failed`, and `deleting`.
    """

    phase: str
    message: str
    age: float


class Refused(SkdError):
    """An answer of the API server that asking again would not change, with its HTTP status."""

    def __init__(self, what: str, *, where: str, hint: str = "", status: int) -> None:
        super().__init__(what, where=where, hint=hint)
        self.status = status


@dataclass
class Cluster:
    """One namespace.

    Every method raises `Refused` for an answer that is final, and `SkdError` where Kubernetes does not answer for
    `patience` seconds. `role` says which rights are needed.
    """

    namespace: str
    api: client.ApiClient
    patience: float = 1800.0
    role: str = ROLE_HINT
    _away_since: float | None = field(default=None, init=False)

    @classmethod
    def connect(cls, section: str = "multinode", role: str = ROLE_HINT) -> Cluster:
        """Return the cluster that this pod is in, or the one of KUBECONFIG; raises SkdError if there is none.

        `section` of the config needs it, with the rights of `role`.
        """
        settings = client.Configuration()
        try:
            if file := os.environ.get("KUBECONFIG"):
                config.load_kube_config(file, client_configuration=settings)
                _, context = config.list_kube_config_contexts(file)
                namespace = context["context"].get("namespace", "default")
            else:
                config.load_incluster_config(client_configuration=settings)
                namespace = _NAMESPACE.read_text(encoding="utf-8").strip()
        except (config.ConfigException, OSError) as error:
            raise SkdError(
                f"this needs a Kubernetes cluster, and there is none here: {error}",
                where=section,
                hint=f"submit the run to Kubeflow (`skd submit`), or leave `{section}` out",
            ) from error
        settings.retries = 0  # repeated here, with pauses
        return cls(namespace, client.ApiClient(settings), role=role)

    def own_pod(self) -> dict[str, Any]:
        """Return the pod of this process."""
        name = os.environ.get(POD_VARIABLE) or os.environ.get("HOSTNAME", "")
        return self._pod(name, None)

    def pod(self, name: str, patience: float | None = None) -> dict[str, Any] | None:
        """Return a pod; None if there is none."""
        found: dict[str, Any] | None = self._unless_missing(self._pod, name, patience)
        return found

    def make(self, manifest: Mapping[str, Any], *, dry_run: bool = False) -> None:
        """Create a pod or a Secret, or with `dry_run` only have it checked."""
        kind, name = str(manifest["kind"]).lower(), manifest["metadata"]["name"]
        options = {"field_validation": "Strict", **({"dry_run": "All"} if dry_run else {})}
        create = getattr(client.CoreV1Api(self.api), f"create_namespaced_{kind}")
        request = partial(create, self.namespace, dict(manifest), _preload_content=False, **options)
        self._ask(f"create {kind} {name}", request, 30 if dry_run else None)

    def remove(self, kind: str, name: str, patience: float | None = None) -> bool:
        """Delete a pod or a Secret; False if there was none."""
        delete = getattr(client.CoreV1Api(self.api), f"delete_namespaced_{kind}")
        request = partial(delete, name, self.namespace, _preload_content=False)
        return self._unless_missing(self._ask, f"delete {kind} {name}", request, patience) is not None

    def job(self, name: str) -> JobState | None:
        """Return the state of a job; None if there is none."""
        get = self._jobs().get_namespaced_custom_object
        job = self._unless_missing(self._ask, f"get trainjob {name}", partial(get, *self._at(name)))
        return None if job is None else _state(job)

    def jobs(self, run_id: str, patience: float | None = None) -> dict[str, JobState]:
        """Return the states of a pipeline run's jobs, by name; refused (404) in a cluster without TrainJobs."""
        selector = f"{RUN_LABEL}={run_label(run_id)}"
        listing = partial(self._jobs().list_namespaced_custom_object, *self._at(), label_selector=selector)
        found = self._ask(f"list trainjobs of run {run_id}", listing, patience)
        return {job["metadata"]["name"]: _state(job) for job in found["items"]}

    def create(self, manifest: Mapping[str, Any], *, dry_run: bool = False) -> bool:
        """Create a job, or with `dry_run` only have it checked, by Trainer too; False if one of its name is there.

        That one was made at the same time, or by a request whose answer was lost.
        """
        # Strict: a field that this version of Trainer does not have would be dropped silently.
        options = {"field_validation": "Strict", **({"dry_run": "All"} if dry_run else {})}
        make = partial(self._jobs().create_namespaced_custom_object, *self._at(), dict(manifest), **options)
        try:
            self._ask(f"create trainjob {manifest['metadata']['name']}", make, 30 if dry_run else None)
        except Refused as refused:
            if refused.status == 409 or (dry_run and _UNASKED in refused.what):
                return False
            if refused.status == 404:
                hint = "install Kubeflow Trainer 2.1 or later, or leave `multinode` out"
                raise SkdError(
                    "this cluster has no TrainJobs", where=f"namespace {self.namespace}", hint=hint
                ) from None
            refused.hint = refused.hint or RUNTIME_HINT
            raise
        return True

    def delete(self, name: str, patience: float | None = None) -> bool:
        """Delete a job; False if there was none.

        Its pods end later, in the background. While a job waits for them to be gone, Trainer starts new ones (2.1.0,
        2.2.1: its reconciler does not look at `deletionTimestamp`).
        """
        remove = partial(self._jobs().delete_namespaced_custom_object, *self._at(name), propagation_policy="Background")
        return self._unless_missing(self._ask, f"delete trainjob {name}", remove, patience) is not None

    def pods(self, job: str) -> list[dict[str, Any]]:
        """Return the pods of a job's nodes, oldest first."""
        selector = f"jobset.sigs.k8s.io/jobset-name={job},jobset.sigs.k8s.io/replicatedjob-name={NODE}"
        pods = self._list(f"list pods of {job}", selector)
        return sorted(pods, key=lambda pod: str(pod["metadata"].get("creationTimestamp", "")))

    def servers(self, run_id: str, patience: float | None = None) -> list[dict[str, Any]]:
        """Return the pods of a pipeline run's vLLM servers."""
        selector = f"{RUN_LABEL}={run_label(run_id)},app.kubernetes.io/name={SERVER}"
        return self._list(f"list vLLM servers of run {run_id}", selector, patience)

    def log(self, pod: str, *, since_seconds: int | None, follow: bool, **more: Any) -> urllib3.HTTPResponse:
        """Return a node's log, each line with its time before it; it must be read and released.

        Raises ApiException if the API server has no log of it, and urllib3's HTTPError while that is away.
        """
        options: dict[str, Any] = more if since_seconds is None else {**more, "since_seconds": since_seconds}
        response: urllib3.HTTPResponse = client.CoreV1Api(self.api).read_namespaced_pod_log(
            pod,
            self.namespace,
            container=NODE,
            follow=follow,
            timestamps=True,
            _preload_content=False,
            _request_timeout=(5, _LOG_SILENCE),
            **options,
        )
        return response

    def _pod(self, name: str, patience: float | None) -> dict[str, Any]:
        # Pods are read as they come: the client's models refuse what a newer cluster leaves out.
        read = partial(client.CoreV1Api(self.api).read_namespaced_pod, name, self.namespace, _preload_content=False)
        found: dict[str, Any] = json.loads(self._ask(f"get pod {name}", read, patience).data)
        return found

    def _list(self, what: str, selector: str, patience: float | None = None) -> list[dict[str, Any]]:
        listing = client.CoreV1Api(self.api).list_namespaced_pod
        request = partial(listing, self.namespace, label_selector=selector, _preload_content=False)
        pods: list[dict[str, Any]] = json.loads(self._ask(what, request, patience).data)["items"]
        return pods

    def _unless_missing(self, ask: Callable[..., Any], *about: Any) -> Any:
        try:
            return ask(*about)
        except Refused as refused:
            if refused.status == 404:
                return None
            raise

    def _jobs(self) -> client.CustomObjectsApi:
        return client.CustomObjectsApi(self.api)

    def _at(self, *name: str) -> tuple[str, ...]:
        return (GROUP, VERSION, self.namespace, PLURAL, *name)

    def _ask(self, what: str, request: Callable[..., Any], patience: float | None = None) -> Any:
        """Make a request again and again, with growing pauses, until it is answered."""
        limit, begin, pause = self.patience if patience is None else patience, time.monotonic(), 0.5
        while True:
            try:
                answer = request(_request_timeout=_TIMEOUT)
            except ApiException as error:
                if error.status not in _AWAY:
                    raise self._refused(what, error) from error
                reason = f"{error.status} {error.reason}"
            except urllib3.exceptions.HTTPError as error:
                reason = str(error)
            else:
                if self._away_since is not None:
                    log.info("Kubernetes answers again, after %.0f s", time.monotonic() - self._away_since)
                    self._away_since = None
                return answer
            if self._away_since is None:
                self._away_since = begin
                log.warning("Kubernetes does not answer, it is asked again: %s", reason)
            if time.monotonic() - begin + pause > limit:
                raise Transient(
                    f"Kubernetes has not answered for {limit:.0f} s: {reason}",
                    where=what,
                    hint="what the step has made goes on without it; a retry of the step takes that up, or replaces it",
                )
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)

    def _refused(self, what: str, error: ApiException) -> Refused:
        try:
            message = str(json.loads(error.body)["message"])
        except (TypeError, ValueError, KeyError):
            message = f"{error.status} {error.reason}"
        where = f"namespace {self.namespace}, {what}"
        if error.status == 401 or _NO_RIGHT.search(message):
            return Refused(f"not allowed: {message}", where=where, hint=self.role, status=error.status)
        return Refused(f"Kubernetes refuses: {message}", where=where, status=error.status)


def _state(job: Mapping[str, Any]) -> JobState:
    created = job["metadata"].get("creationTimestamp")
    age = time.time() - datetime.fromisoformat(created).timestamp() if created else 0.0
    if job["metadata"].get("deletionTimestamp"):
        return JobState("deleting", "", age)
    for condition in job.get("status", {}).get("conditions", []):
        if condition["status"] == "True" and condition["type"] in ("Complete", "Failed"):
            message = f"{condition.get('message', '')} ({condition.get('reason', '')})".strip()
            return JobState(condition["type"].lower(), message, age)
    return JobState("running", "", age)
