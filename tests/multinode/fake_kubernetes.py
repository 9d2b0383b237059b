"""An HTTP server that speaks the part of Kubernetes' REST API that a TrainJob, and pods of servers, need.

What Kubernetes, JobSet and Trainer do behind it is as it was seen on Kubernetes 1.35.4, JobSet 0.11.1 and Kubeflow
Trainer 2.1.0 and 2.2.1, or as Trainer 2.2.1's source has it, where a comment says so.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from tests.support import http

JOBS = "/apis/trainer.kubeflow.org/v1alpha1/namespaces/team/trainjobs"
CORE = "/api/v1/namespaces/team/pods"
SECRETS = "/api/v1/namespaces/team/secrets"
FORBIDDEN = (
    'trainjobs.trainer.kubeflow.org is forbidden: User "system:serviceaccount:team:x" cannot create resource '
    '"trainjobs" in API group "trainer.kubeflow.org" in the namespace "team"'
)
STEP_POD: dict[str, Any] = {
    "metadata": {"name": "step-pod", "namespace": "team", "uid": "6e0a"},
    "spec": {
        "serviceAccountName": "pipeline-runner",
        "nodeSelector": {"cloud.google.com/gke-accelerator": "nvidia-l4"},
        "tolerations": [
            {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"},
            {"key": "node.kubernetes.io/not-ready", "operator": "Exists", "tolerationSeconds": 300},
        ],
        "volumes": [
            {"name": "skd-mlflow", "secret": {"secretName": "skd-mlflow", "optional": True}},
            {"name": "my-minio-cred", "secret": {"secretName": "mlpipeline-minio-artifact"}},
            {"name": "var-run-argo", "emptyDir": {}},
            {"name": "kube-api-access-x", "projected": {"sources": []}},
        ],
        "containers": [
            {"name": "wait", "image": "argoexec:v3"},
            {
                "name": "main",
                "image": "registry/skd-train@sha256:" + "a" * 64,
                "env": [
                    {
                        "name": "SKD_TRACKING_URI",
                        "valueFrom": {"configMapKeyRef": {"name": "skd-settings", "key": "mlflow-tracking-uri"}},
                    },
                    {"name": "SKD_LOG_LEVEL", "value": "INFO"},
                    {
                        "name": "KFP_RUN_ID",
                        "valueFrom": {"fieldRef": {"fieldPath": "metadata.labels['pipeline/runid']"}},
                    },
                    {"name": "ARGO_TEMPLATE", "value": "{}"},
                    {"name": "MY_NODE", "valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}}},
                ],
                "volumeMounts": [
                    {"name": "skd-mlflow", "mountPath": "/etc/skd/skd-mlflow"},
                    {"name": "var-run-argo", "mountPath": "/var/run/argo"},
                    {"name": "kube-api-access-x", "mountPath": "/var/run/secrets/kubernetes.io/serviceaccount"},
                ],
                "resources": {
                    "limits": {"memory": "64Gi", "nvidia.com/gpu": "2"},
                    "requests": {"cpu": "8", "memory": "64Gi"},
                },
            },
        ],
    },
}


class FakeKubernetes:
    """One namespace, `team`.

    Attributes:
        address: Where it listens.
        jobs: TrainJobs by name.
        pods: Pods by name.
        secrets: Secrets by name.
        on_pod: Told of each pod that was made, and of each that is gone (without its status).
        logs: Lines of each pod's log, with their times.
        requests: Method and path of each request.
        refused: Statuses for requests to come: while there are any, each request gets the first one, None lets it pass.
        away_until: Until then (monotonic), all get 503.
        on_create: Told of each job that was made; the kubelet.
        on_delete: Told of each job that is to go.
        on_stop: Told after that, while the nodes are still there: the kubelet, which ends them.
        pod_seconds: For which a pod outlives its job's deletion.
        ghosts: Pods that Trainer has made for a job that is being deleted.
        runtimes: The namespace's TrainingRuntimes.
        messages: What refusals say, instead of the usual, by status.
        cut_logs: Bytes of a log after which the connection is cut, one for each request to come.
        hold_logs: A followed log stays open while this is set.
    """

    def __init__(self) -> None:
        self.jobs: dict[str, dict[str, Any]] = {}
        self.pods: dict[str, dict[str, Any]] = {"step-pod": STEP_POD}
        self.secrets: dict[str, dict[str, Any]] = {}
        self.on_pod: Callable[[dict[str, Any]], None] = lambda pod: None
        self.logs: dict[str, list[str]] = {}
        self.requests: list[str] = []
        self.refused: dict[str, list[int]] = {}
        self.away_until = 0.0
        self.on_create: Callable[[dict[str, Any]], None] = lambda job: None
        self.on_delete: Callable[[dict[str, Any]], None] = lambda job: None
        self.on_stop: Callable[[dict[str, Any]], None] = lambda job: None
        self.pod_seconds = 0.0
        self.ghosts: list[str] = []
        self.runtimes = {"skd-torch"}
        self.messages: dict[int, str] = {}
        self.cut_logs: list[int] = []
        self.sinces: list[int | None] = []
        self._lock = threading.Lock()
        self._server = http.Server(_handler(self)).__enter__()
        self.address = self._server.url

    def close(self) -> None:
        self._server.__exit__()

    def kubeconfig(self, folder: Path) -> Path:
        context = {"cluster": "fake", "user": "tester", "namespace": "team"}
        text = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "fake", "cluster": {"server": self.address}}],
            "users": [{"name": "tester", "user": {"token": "t0ken"}}],
            "contexts": [{"name": "fake", "context": context}],
            "current-context": "fake",
        }
        (folder / "kubeconfig").write_text(json.dumps(text))
        return folder / "kubeconfig"

    def add_node(self, job: str, index: int, phase: str = "Running", suffix: str = "", **status: Any) -> str:
        name = f"{job}-node-0-{index}-x{suffix}"
        labels = {
            "jobset.sigs.k8s.io/jobset-name": job,
            "jobset.sigs.k8s.io/replicatedjob-name": "node",
            "batch.kubernetes.io/job-completion-index": str(index),
        }
        self.pods[name] = {
            "metadata": {"name": name, "labels": labels, "creationTimestamp": _now()},
            "spec": {"containers": [{"name": "node"}]},
            "status": {"phase": phase, **status},
        }
        self.logs.setdefault(name, [])
        return name

    def write(self, pod: str, *lines: str, stamp: str | None = None) -> None:
        for line in lines:
            self.logs[pod].append(f"{stamp or _now()} {line}")

    def end(self, job: str, kind: str = "Complete", message: str = "all done", reason: str = "JobsCompleted") -> None:
        for pod in self.pods_of(job).values():
            pod["status"]["phase"] = "Succeeded" if kind == "Complete" else "Failed"
        condition = {"type": kind, "status": "True", "message": message, "reason": reason, "lastTransitionTime": _now()}
        self.jobs[job]["status"] = {"conditions": [condition]}

    def pods_of(self, job: str) -> dict[str, dict[str, Any]]:
        label = "jobset.sigs.k8s.io/jobset-name"
        return {name: pod for name, pod in self.pods.items() if pod["metadata"].get("labels", {}).get(label) == job}

    def create(self, job: dict[str, Any]) -> bool:
        name = job["metadata"]["name"]
        with self._lock:
            if name in self.jobs:
                return False
            job["metadata"]["creationTimestamp"] = _now()
            self.jobs[name] = job
        self.on_create(job)
        return True

    def delete(self, name: str, policy: str = "Background") -> bool:
        """Delete a job, and some time later its pods.

        Seen with Trainer 2.1.0 and 2.2.1: while a job waits for its pods to be gone (`Foreground`), Trainer makes new
        ones, unless it is complete.
        """
        with self._lock:
            job = self.jobs.get(name)
        if job is None:
            return False
        self.on_delete(job)
        complete = any(each["type"] == "Complete" for each in job.get("status", {}).get("conditions", []))
        ghosts = policy == "Foreground" and not complete
        self.jobs.pop(name, None)
        threading.Thread(target=self._stop, args=(job, self.pods_of(name), ghosts), daemon=True).start()
        return True

    def _stop(self, job: dict[str, Any], pods: dict[str, dict[str, Any]], ghosts: bool) -> None:
        self.on_stop(job)
        time.sleep(self.pod_seconds)
        for pod in pods:
            self.pods.pop(pod, None)
        if ghosts:
            time.sleep(0.2)
            self.ghosts.append(self.add_node(job["metadata"]["name"], 0, suffix="-ghost"))
            time.sleep(1)
            self.pods.pop(self.ghosts[-1], None)


@contextmanager
def running() -> Iterator[FakeKubernetes]:
    server = FakeKubernetes()
    try:
        yield server
    finally:
        server.close()


def _now() -> str:
    return datetime.fromtimestamp(time.time(), UTC).strftime("%Y-%m-%dT%H:%M:%S.%f000Z")


def _handler(fake: FakeKubernetes) -> type[http.Handler]:
    class Handler(http.Handler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            if self._turned_away():
                return
            path, query = self._split()
            name = path.rsplit("/", 1)[-1]
            if path == CORE:
                wanted = dict(pair.split("=") for pair in query["labelSelector"].split(","))
                items = [p for p in fake.pods.values() if wanted.items() <= p["metadata"].get("labels", {}).items()]
                self._answer(200, {"kind": "PodList", "apiVersion": "v1", "items": items})
            elif path.startswith(f"{CORE}/") and path.endswith("/log"):
                self._log(path.split("/")[-2], query)
            elif path.startswith(f"{CORE}/"):
                self._found(fake.pods.get(name))
            elif path == JOBS:
                wanted = dict([query["labelSelector"].split("=")])
                items = [job for job in fake.jobs.values() if wanted.items() <= job["metadata"]["labels"].items()]
                self._answer(200, {"kind": "TrainJobList", "items": items})
            elif path.startswith(f"{JOBS}/"):
                self._found(fake.jobs.get(name))
            else:
                self._fail(404, "the server could not find the requested resource")

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self._turned_away():
                return
            path, query = self._split()
            if path in (CORE, SECRETS):
                self._create(fake.pods if path == CORE else fake.secrets, body, query)
                return
            reference = body["spec"]["runtimeRef"]
            if path != JOBS:
                self._fail(404, "the server could not find the requested resource")
            elif query.get("fieldValidation") != "Strict":
                self._fail(400, "the test wants strict validation")
            elif reference["kind"] == "TrainingRuntime" and reference["name"] not in fake.runtimes:
                # Trainer 2.2.1, pkg/runtime/core/trainingruntime.go
                self._fail(
                    403,
                    'admission webhook "validator.trainjob.trainer.kubeflow.org" denied the request: spec.runtimeRef: '
                    f"Invalid value: {json.dumps(reference)}: TrainingRuntime.trainer.kubeflow.org "
                    f'"{reference["name"]}" not found: specified trainingRuntime must be created before the TrainJob '
                    "is created",
                )
            elif query.get("dryRun") == "All":
                self._answer(201, body)
            elif not fake.create(body):
                self._fail(409, f'trainjobs "{body["metadata"]["name"]}" already exists')
            else:
                self._answer(201, body)

        def do_DELETE(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if self._turned_away():
                return
            path, query = self._split()
            folder, _, name = path.rpartition("/")
            if folder in (CORE, SECRETS):
                gone = (fake.pods if folder == CORE else fake.secrets).pop(name, None)
                if gone is None:
                    self._fail(404, f'"{name}" not found')
                else:
                    if folder == CORE:
                        gone.pop("status", None)
                        fake.on_pod(gone)
                    self._answer(200, gone)
            elif fake.delete(name, query.get("propagationPolicy", "Background")):
                self._answer(200, {"kind": "Status", "status": "Success"})
            else:
                self._fail(404, f'trainjobs "{name}" not found')

        def _create(self, there: dict[str, dict[str, Any]], body: dict[str, Any], query: dict[str, str]) -> None:
            assert query["fieldValidation"] == "Strict"
            name = body["metadata"]["name"]
            if name in there:
                self._fail(409, f'"{name}" already exists')
                return
            if query.get("dryRun") != "All":
                there[name] = body
                if body["kind"] == "Pod":
                    body["status"] = {"phase": "Pending"}
                    fake.logs.setdefault(name, [])
                    fake.on_pod(body)
            self._answer(201, body)

        def _split(self) -> tuple[str, dict[str, str]]:
            parts = urlsplit(self.path)
            return parts.path, {name: values[0] for name, values in parse_qs(parts.query).items()}

        def _turned_away(self) -> bool:
            path, _ = self._split()
            fake.requests.append(f"{self.command} {path}")
            assert self.headers["Authorization"] == "Bearer t0ken"
            if time.monotonic() < fake.away_until:
                self._fail(503, "not now")
                return True
            if waiting := fake.refused.get(self.command):
                status = waiting.pop(0)
                self._fail(status, {403: FORBIDDEN, **fake.messages}.get(status, "no"))
                return True
            return False

        def _found(self, item: dict[str, Any] | None) -> None:
            if item is None:
                self._fail(404, "not found")
            else:
                self._answer(200, item)

        def _fail(self, status: int, message: str) -> None:
            self._answer(status, {"kind": "Status", "status": "Failure", "message": message, "code": status})

        def _answer(self, status: int, body: dict[str, Any]) -> None:
            content = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def _log(self, pod: str, query: dict[str, str]) -> None:
            assert query["container"] == "node"
            assert query["timestamps"] == "True"
            fake.sinces.append(int(query["sinceSeconds"]) if "sinceSeconds" in query else None)
            pod += " before" if query.get("previous") == "True" else ""
            if pod not in fake.logs:
                self._fail(400, "previous terminated container not found")
                return
            self.send_response(200)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            left = fake.cut_logs.pop(0) if fake.cut_logs else None
            sent = 0
            while True:
                over = (
                    query.get("follow") != "True" or fake.pods.get(pod, {}).get("status", {}).get("phase") != "Running"
                )
                lines = fake.logs[pod]
                for line in lines[sent:]:
                    content = f"{line}\n".encode()
                    if left is not None and len(content) > left:
                        self._chunk(content[:left])
                        self.close_connection = True  # in the middle of a line, and of the stream
                        return
                    if left is not None:
                        left -= len(content)
                    self._chunk(content)
                    sent += 1
                if over and sent == len(fake.logs[pod]):
                    break
                time.sleep(0.02)
            self.wfile.write(b"0\r\n\r\n")

        def _chunk(self, content: bytes) -> None:
            if content:
                self.wfile.write(f"{len(content):x}\r\n".encode() + content + b"\r\n")
                self.wfile.flush()

    return Handler
