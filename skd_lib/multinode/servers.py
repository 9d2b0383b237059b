"""vLLM servers in pods of their own, for as long as a training step needs them.

- A server's pod gets its models from the step over HTTP, with a token from a Secret that is made for this attempt. It
  reads no storage, so it needs no rights, and a network policy can keep it from everything but steps.
- Its container starts again where vLLM ends, with the same models; the step sets it up again and gets the same samples.
- The step deletes its servers at its end. Those of a step that was killed are deleted by the next attempt or `finish`
  (`skd_lib.multinode.cleanup`); at the latest they go with the step's pod, which owns them.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import urllib3
from kubernetes.client.exceptions import ApiException

from skd_lib._core.machine import ENGINE_IMAGE_VARIABLE, pipeline_run_id
from skd_lib.config import EnginePodsConfig
from skd_lib.errors import Preempted, SkdError, Transient
from skd_lib.multinode.cluster import SERVERS_HINT, Cluster
from skd_lib.multinode.coordinate import Terminated, sigterm_raises, trouble_of
from skd_lib.multinode.manifest import STEP_ANNOTATION, TRIAL_POD, server_name, server_pods, server_secret
from skd_lib.vllm.client import Engine, EngineGone, wait_for_all
from skd_lib.vllm.guard import make_token
from skd_lib.vllm.pod import PORT, START, settings_of
from skd_lib.vllm.serve import Served, cause

log = logging.getLogger(__name__)
POLL_SECONDS = 5.0
GRACE_SECONDS = 300.0
"""For which an image that cannot be pulled, or a pod that does not answer, is waited for: registries hiccup."""
_SECTION = "distill.vllm.pods"
_WAIT = "distill.vllm.wait_minutes"
_LINES_SHOWN = 200
_SILENCE = 20.0
"""Seconds for which a silent API server is asked where the answer is no condition for going on."""


@contextmanager
def servers(
    settings: EnginePodsConfig, wait_minutes: float, served: Served, main: bool = True
) -> Iterator[list[Engine]]:
    """Make servers, wait until they answer, and delete them with the block.

    Args:
        settings: Their number, machines and image.
        wait_minutes: Time for a server to have a machine, and to answer.
        served: The models, and what they are served with.
        main: This process makes them; others of the same pod wait for those that it makes.

    Raises:
        SkdError: there is no cluster, it refuses, or a server does not start; the end of its log is written first.
        Preempted: SIGTERM came before they answered.
    """
    image = image_of(settings)
    cluster = connect()
    own, run_id = cluster.own_pod(), pipeline_run_id()
    if not main:
        names = [f"{server_name(own)}-{number}" for number in range(settings.count)]
        urls = [_Server(cluster, name, wait_minutes * 60).url(expected=True) for name in names]
        engines = [Engine(url, wait_minutes * 60, shared=False) for url in urls]
        wait_for_all(engines)
        yield engines
        return
    delete_left_behind(cluster, run_id)
    token = make_token()
    pods = server_pods(own, settings, run_id=run_id, image=image, gpus=served.tensor_parallel)
    names = [pod["metadata"]["name"] for pod in pods]
    try:
        with sigterm_raises():
            cluster.make(server_secret(own, run_id, token))
            for pod in pods:
                cluster.make(pod)
            log.info("made pods for vLLM servers: %s", ", ".join(names))
            engines = _ready([_Server(cluster, name, wait_minutes * 60) for name in names], served)
        yield engines
    except Terminated:
        raise Preempted("stopped by SIGTERM while vLLM's servers started", hint="start the step again") from None
    except Preempted:
        raise
    except SkdError:
        for name in names:
            _show_log(cluster, name)
        raise
    finally:
        for name in names:
            _delete(cluster, "pod", name)
        _delete(cluster, "secret", server_name(own))


def connect() -> Cluster:
    """Return the cluster that this pod is in; raises SkdError if there is none."""
    return Cluster.connect(_SECTION, SERVERS_HINT)


def image_of(settings: EnginePodsConfig) -> str:
    """Return the servers' image.

    Raises:
        SkdError: neither the configuration nor the pipeline names one.
    """
    if image := settings.image or os.environ.get(ENGINE_IMAGE_VARIABLE, ""):
        return image
    hint = "build the image `vllm` (images/README.md), push it, and name it there"
    raise SkdError("no image is named for vLLM's servers", where=f"{_SECTION}.image", hint=hint)


def check_servers(settings: EnginePodsConfig, gpus: int) -> None:
    """Have Kubernetes check what a step would make, without making it.

    Raises:
        SkdError: no image is named, there is no cluster, or it refuses.
    """
    image, cluster = image_of(settings), connect()
    cluster.make(server_secret(TRIAL_POD, "preflight", "unused"), dry_run=True)
    cluster.make(server_pods(TRIAL_POD, settings, run_id="preflight", image=image, gpus=gpus)[0], dry_run=True)
    cluster.servers("preflight", patience=_SILENCE)


def delete_left_behind(
    cluster: Cluster, run_id: str, patience: float | None = None, *, ended: bool = False
) -> list[str]:
    """Delete a pipeline run's servers whose step has ended, which all have with `ended`; return their names."""
    left = []
    for pod in cluster.servers(run_id, patience):
        step = None if ended else cluster.pod(pod["metadata"]["annotations"][STEP_ANNOTATION], patience)
        if step is None or step.get("status", {}).get("phase") in ("Succeeded", "Failed"):
            left.append(pod["metadata"]["name"])
            cluster.remove("pod", left[-1], patience)
            cluster.remove("secret", left[-1].rpartition("-")[0], patience)
    if left:
        log.info("deleted vLLM servers whose step has ended: %s", ", ".join(left))
    return left


def _ready(made: list[_Server], served: Served) -> list[Engine]:
    """Wait for pods, give them their models, and wait until vLLM answers in all."""
    urls = [server.url() for server in made]
    pool = ThreadPoolExecutor(len(made))
    try:
        list(pool.map(lambda server, url: server.send_models(Engine(url), served), made, urls))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # after SIGTERM the pods are deleted first, which ends it
    for server, url in zip(made, urls, strict=True):
        server.wait(Engine(url, server.wait_s, server.check_start))
    # One of several that is lost is done without.
    return [
        Engine(url, server.wait_s, server.check if len(made) == 1 else None, shared=False)
        for server, url in zip(made, urls, strict=True)
    ]


@dataclass(frozen=True)
class _Server:
    """A server by its pod."""

    cluster: Cluster
    name: str
    wait_s: float

    def state(self, *, expected: bool = False) -> Mapping[str, Any]:
        """Return the pod's status, with `trouble` in words; with `expected` it may be missing yet.

        Raises:
            SkdError: it is gone, or has ended.
        """
        pod = self.cluster.pod(self.name, _SILENCE)
        if pod is None and expected:
            return {"trouble": ""}
        hint = "retry the step: it makes another one, and goes on from its last checkpoint"
        if pod is None or pod["metadata"].get("deletionTimestamp"):
            raise SkdError("the pod of a vLLM server has been deleted", where=self.name, hint=hint)
        status: Mapping[str, Any] = pod.get("status", {})
        trouble = trouble_of(pod).removeprefix(f"{self.name}: ")
        if status.get("phase") in ("Failed", "Succeeded"):
            why = ": ".join(filter(None, [status.get("reason"), status.get("message")])) or trouble
            raise SkdError(f"the pod of a vLLM server has ended: {why}", where=self.name, hint=hint)
        return {**status, "trouble": trouble}

    def check_start(self) -> None:
        """Raise SkdError if vLLM has ended before it answered."""
        state = self.state()
        if any(each.get("restartCount") for each in state.get("containerStatuses", [])):
            log = "".join(_log(self.cluster, self.name, previous=previous) for previous in (True, False))
            raise SkdError(
                f"vLLM ended before it answered: {cause(log) or state['trouble']}",
                where=self.name,
                hint="its log is above; it may start with less memory in use (`distill.vllm.max_rows`), or more GPUs "
                "(`tensor_parallel`)",
            )

    def check(self) -> None:
        """Raise SkdError if the pod is gone; a container that ends starts again."""
        try:
            self.state()
        except SkdError as error:
            if error.where == self.name:
                raise
            log.warning("the pod %s cannot be looked at: %s", self.name, error.brief)

    def url(self, *, expected: bool = False) -> str:
        """Wait until the container runs, and return its address.

        Raises:
            SkdError: it does not for too long, or its image cannot be pulled.
        """
        seen, begin = "", time.monotonic()
        while True:
            state = self.state(expected=expected)
            trouble = state["trouble"]
            if (address := state.get("podIP", "")) and state["phase"] == "Running":
                return f"http://[{address}]:{PORT}" if ":" in address else f"http://{address}:{PORT}"
            if trouble != seen:
                log.info("waiting for %s: %s", self.name, trouble or state.get("phase", "Pending"))
                seen = trouble
            unpulled = "ImagePull" in trouble or "InvalidImage" in trouble
            limit = min(GRACE_SECONDS, self.wait_s) if unpulled else self.wait_s
            if time.monotonic() - begin > limit:
                machine = (
                    f"the cluster needs a machine with what `{_SECTION}.resources` asks for, and `node_selector` and "
                    f"`tolerations` must fit it; or raise `{_WAIT}` ({self.wait_s / 60:g})"
                )
                image = f"name one in `{_SECTION}.image` that the cluster can pull (images/README.md: `vllm`)"
                raise SkdError(
                    f"the pod of a vLLM server does not start: {trouble or state.get('phase', 'Pending')}",
                    where=self.name,
                    hint=image if unpulled else machine,
                )
            time.sleep(POLL_SECONDS)

    def send_models(self, engine: Engine, served: Served) -> None:
        """Send both models, and have them served."""
        for kind, folder in (("teacher", served.teacher), ("student", served.student)):
            files = sorted(path for path in folder.rglob("*") if path.is_file())
            log.info("sending the %s to %s: %.1f GB", kind, self.name, sum(each.stat().st_size for each in files) / 1e9)
            for file in files:
                name = f"{kind}/{file.relative_to(folder).as_posix()}"
                self._again(partial(engine.send, file, name))
        self._again(partial(engine.post, START, settings_of(served)))

    def wait(self, engine: Engine) -> None:
        """Wait until vLLM has loaded the models and answers."""
        try:
            engine.wait()
        except SkdError as error:
            if error.where != engine.url:
                raise
            hint = f"its log is above; if it loads the models still, raise `{_WAIT}`"
            kind = Transient if isinstance(error, Transient) else SkdError
            raise kind(error.what, where=self.name, hint=hint) from error
        log.info("vLLM answers in %s", self.name)

    def _again(self, ask: Callable[[], object]) -> None:
        """Ask until the connection holds: the program in the container may not listen yet."""
        deadline = time.monotonic() + GRACE_SECONDS
        while True:
            try:
                ask()
                return
            except EngineGone as error:
                self.check_start()
                if time.monotonic() > deadline:
                    raise SkdError(
                        f"the pod of a vLLM server runs, but cannot be reached: {error}",
                        where=self.name,
                        hint="network policies must let the step's pod reach it: see pipelines/deploy/engine",
                    ) from error
            time.sleep(POLL_SECONDS)


def _show_log(cluster: Cluster, name: str) -> None:
    """Write the end of a server's log, and of the one before it if its container was started again."""
    for previous in (True, False):
        if text := _log(cluster, name, previous=previous):
            which = ", before it started again" if previous else ""
            print(f"--- the end of the log of {name}{which}\n{text}---", flush=True)


def _log(cluster: Cluster, name: str, *, previous: bool) -> str:
    """Return the end of a server's log, or of the one before its container started again; empty if there is none."""
    try:
        response = cluster.log(name, since_seconds=None, follow=False, tail_lines=_LINES_SHOWN, previous=previous)
        text = response.read().decode(errors="replace")
        response.close()
    except (ApiException, urllib3.exceptions.HTTPError):
        return ""
    return text


def _delete(cluster: Cluster, kind: str, name: str) -> None:
    try:
        cluster.remove(kind, name, _SILENCE)
    except SkdError as error:
        command = f"kubectl delete {kind} {name} -n {cluster.namespace}"
        log.error("a vLLM server's %s could not be deleted; `%s`: %s", kind, command, error.brief)
