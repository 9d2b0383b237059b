"""A training step that makes a `TrainJob`, waits for it, and takes its results as its own.

- An attempt after a lost pod finds the job by its name and waits for it as the first one did. A job that has failed is
  replaced, and its training goes on from the last checkpoint.
- SIGTERM deletes the job: Kubernetes does not say whether a person has ended the run or a machine is taken away, and
  several nodes must not go on unattended. The nodes get SIGTERM in turn and save a checkpoint; the exit code is that of
  `Preempted`, so that a retry goes on from there.
"""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from skd_lib._core.machine import RUN_ID_VARIABLE, pipeline_run_id
from skd_lib.config import MultinodeConfig
from skd_lib.errors import Preempted, SkdError, Transient
from skd_lib.multinode.exchange import EXECUTOR_OUTPUT, Exchange, Request, check_reachable
from skd_lib.multinode.manifest import job_name, train_job

if TYPE_CHECKING:
    from skd_lib.multinode.cluster import Cluster, JobState
    from skd_lib.steps.runtime import StepIO

log = logging.getLogger(__name__)
Made = Mapping[str, Callable[[Path], object]]
POLL_SECONDS = 10.0
GONE_SECONDS = 900.0
"""For which a retry waits for the pods of an earlier job, beyond the time that they may take to end.

Where a machine is lost, Kubernetes deletes its pods after about 6 minutes (one until it is missed, and the 5 of the
default toleration of `unreachable`). They are gone when the cloud has deleted the machine, some minutes more; without
a cloud they stay until a person deletes them."""
_GRACE_SECONDS = 30
"""Kubernetes' `terminationGracePeriodSeconds`, where a pod does not say."""
_REMIND_SECONDS = 180.0
"""After which a retry that still waits for these pods says so again."""
_ERROR = re.compile(r"^error: .*(?:\n- .*)*", re.MULTILINE)
"""An error as `run_step` prints it, without hints."""
_CANCEL_SECONDS = 20.0
"""For which a cancelling step asks a silent API server, if it lives so long: Kubeflow Pipelines gives it about one."""


@dataclass(frozen=True)
class Work:
    """A training step (a module of `skd_lib.steps`) with its options; its config is without `multinode`.

    `inputs` are local paths by option, `outputs` names of artifacts by option. The functions of `made` write further
    inputs for the nodes to the paths that they are given, when a new job is started.
    """

    step: str
    options: Mapping[str, str]
    inputs: Mapping[str, Path]
    outputs: Mapping[str, str]
    made: Made = field(default_factory=dict)


def train_on_nodes(work: Work, settings: MultinodeConfig, io: StepIO) -> None:
    """Do a step's work on several nodes and write its outputs as the step itself would.

    Raises SkdError if there is no cluster, the nodes could not reach the inputs, or the job is refused, failed or took
    too long; Transient if pods of an earlier job stay; Preempted after SIGTERM, with the job deleted.
    """
    if os.environ.get("LOCAL_RANK", "0") != "0":
        return  # one of several processes on the GPUs of this pod, which are not trained on: the first one waits
    root, run_id = work.options["checkpoint_root"].rstrip("/"), pipeline_run_id()
    uris = {name: io.input_uri(name, path) for name, path in work.inputs.items()}
    check_reachable({**{f"input {name}": uri for name, uri in uris.items()}, "checkpoint_root": root})
    if not run_id:
        hint = "the pipeline sets it from the pod's label `pipeline/runid`; set it by hand to any name of this run"
        raise SkdError("the pipeline run is not known, by which the job is named", where=RUN_ID_VARIABLE, hint=hint)

    from skd_lib.multinode.cluster import Cluster

    name = job_name(work.step, run_id, [dict(work.options), uris])
    exchange = Exchange(f"{root}/multinode/{name}")
    request = Request(
        step=work.step,
        options=dict(work.options),
        inputs=uris,
        outputs=dict(work.outputs),
        artifacts={output: io.output_uri(output) for output in work.outputs.values()},
    )
    cluster = Cluster.connect()
    with sigterm_raises():
        try:
            if not exchange.is_complete():
                _start(cluster, name, settings, exchange, request, work.made)
                _wait(cluster, name, settings, exchange)
        except Terminated:
            _cancel(cluster, name)
            raise Preempted(
                f"stopped by SIGTERM; the TrainJob {name} is deleted, and its nodes save a checkpoint",
                hint="retry the step or start the run again with the same settings: it goes on from there",
            ) from None
    _collect(exchange, io, work)
    cluster.delete(name)
    exchange.remove()


def _start(
    cluster: Cluster, name: str, settings: MultinodeConfig, exchange: Exchange, request: Request, made: Made
) -> None:
    """Start a job of this name, unless one is there that has not failed."""
    if _taken_up(cluster, name):
        return
    with tempfile.TemporaryDirectory() as folder:
        paths = {option: Path(folder) / option for option in made}
        for option, make in made.items():
            make(paths[option])
        given = exchange.give(paths)
    exchange.write(request.model_copy(update={"inputs": {**request.inputs, **given}}))
    manifest = train_job(name, settings, cluster.own_pod(), run_id=pipeline_run_id(), arguments=[exchange.uri])
    created = cluster.create(manifest)
    nodes = f"{settings.nodes} nodes of {manifest['spec']['trainer']['numProcPerNode']} processes"
    log.info("%s the TrainJob %s: %s", "created" if created else "another attempt has created", name, nodes)


def _taken_up(cluster: Cluster, name: str) -> bool:
    """Return whether a job of this name goes on or is complete; a failed one is deleted, with its pods.

    The pods of a deleted job have the names by which those of a new one find each other.

    Raises:
        Transient: something of an earlier job does not go.
    """
    waited, next_word = 0.0, 0.0  # by the pauses: while Kubernetes does not answer, no pod can go either
    while True:
        state = cluster.job(name)
        if state is not None and state.phase not in ("failed", "deleting"):
            log.info("taking up the TrainJob %s, which is there already", name)
            return True
        if state is not None and state.phase == "failed":
            log.info("the TrainJob %s of an earlier attempt has failed and is replaced: %s", name, state.message)
            cluster.delete(name)
        elif not (pods := cluster.pods(name)) and state is None:
            return False
        elif waited >= GONE_SECONDS + max(map(_grace, pods), default=0):
            raise _left_behind(cluster, name, pods, waited)
        elif waited >= next_word:
            left = ", ".join(map(_placed, pods)) or "none; the job itself is being deleted"
            log.info(
                "waiting until the pods of the earlier TrainJob %s are gone, %.0f s so far: %s", name, waited, left
            )
            next_word = waited + _REMIND_SECONDS
        time.sleep(POLL_SECONDS)
        waited += POLL_SECONDS


def _grace(pod: Mapping[str, Any]) -> float:
    """Return the seconds that a pod may take to end after its deletion."""
    return float(pod.get("spec", {}).get("terminationGracePeriodSeconds") or _GRACE_SECONDS)


def _placed(pod: Mapping[str, Any]) -> str:
    """Return a pod's name with that of its machine."""
    machine = pod.get("spec", {}).get("nodeName")
    return f"{pod['metadata']['name']}{f' on {machine}' if machine else ''}"


def _left_behind(cluster: Cluster, name: str, pods: Sequence[Mapping[str, Any]], waited: float) -> Transient:
    """Return the error that an earlier job, or its pods, do not go."""
    after = f"after {waited / 60:.0f} minutes"
    if not pods:
        return Transient(
            f"the earlier TrainJob is still being deleted {after}",
            where=name,
            hint=f"`kubectl get trainjob {name} -n {cluster.namespace} -o yaml` shows the finalizers that it waits for",
        )
    names = " ".join(pod["metadata"]["name"] for pod in pods)
    return Transient(
        f"pods of the earlier TrainJob are still there {after}: {', '.join(map(_placed, pods))}",
        where=name,
        hint="if their machine is lost, see that it is off and delete them, `kubectl delete pod --force "
        f"-n {cluster.namespace} {names}`; a retry of the step goes on from the last checkpoint",
    )


def _wait(cluster: Cluster, name: str, settings: MultinodeConfig, exchange: Exchange) -> None:
    """Wait until the job has ended, and write its first node's log.

    Raises SkdError if it has failed, was deleted, or took longer than it may.
    """
    from skd_lib.multinode.logs import LogFollower

    with LogFollower(cluster, name, partial(print, flush=True), pause=min(2.0, POLL_SECONDS)):
        state, trouble = _watch(cluster, name, settings)
    if state.phase == "failed" and not exchange.is_complete():
        causes = "; ".join(filter(None, map(trouble_of, cluster.pods(name))))
        if not causes and trouble:  # Kubernetes has deleted the pods by now
            causes = f"before that: {trouble}"
        advice = "raise multinode.timeout_hours; " if "(DeadlineExceeded)" in state.message else ""
        raise SkdError(
            f"the TrainJob has failed: {state.message}{f'; {causes}' if causes else ''}",
            where=name,
            hint=f"{advice}its first node's log is above; `kubectl describe trainjob {name} -n {cluster.namespace}` "
            "shows more, until a retry replaces it and goes on from the last checkpoint",
        )


def _watch(cluster: Cluster, name: str, settings: MultinodeConfig) -> tuple[JobState, str]:
    """Return a job's state when it has ended, and the last trouble of its nodes that was seen."""
    limit = None if settings.timeout_hours is None else settings.timeout_hours * 3600
    seen = trouble = ""
    while True:
        state = cluster.job(name)
        if state is None or state.phase == "deleting":
            raise SkdError(
                "the TrainJob has been deleted", where=name, hint="retry the step: it goes on from its checkpoint"
            )
        if state.phase != "running":
            return state, trouble
        if limit is not None and state.age > limit:
            cluster.delete(name)
            hint = "raise multinode.timeout_hours; a retry goes on from the last checkpoint"
            raise SkdError(f"it took longer than {settings.timeout_hours} hours, and is deleted", where=name, hint=hint)
        pods = cluster.pods(name)
        if (news := "; ".join(filter(None, map(trouble_of, pods)))) != seen:
            log.info("nodes: %s", news or "all are running")
            seen = news
        trouble = news or trouble
        time.sleep(POLL_SECONDS)


def trouble_of(pod: Mapping[str, Any]) -> str:
    """Return the reasons why a node does not run, or has ended; empty if there are none."""
    status = pod.get("status", {})
    reasons = [
        f"{each.get('reason', each['type'])}: {each.get('message', '')}".removesuffix(": ")
        for each in status.get("conditions", [])
        if (each["type"], each["status"]) in (("PodScheduled", "False"), ("DisruptionTarget", "True"))
    ]
    for container in status.get("containerStatuses", []):
        state = container.get("state", {})
        if waiting := state.get("waiting"):
            reasons.append(f"{waiting.get('reason', 'waiting')}: {waiting.get('message', '')}".removesuffix(": "))
        ended = state.get("terminated") or container.get("lastState", {}).get("terminated", {})
        if ended.get("exitCode"):
            reasons.append(_end(ended))
    return f"{pod['metadata']['name']}: {', '.join(reasons)}" if reasons else ""


def _end(terminated: Mapping[str, Any]) -> str:
    """Describe a container's end, with the error in its last lines, where the runtime has Kubernetes keep those."""
    errors = _ERROR.findall(terminated.get("message", ""))
    error = f": {' '.join(errors[-1].split())}" if errors else ""
    return f"{terminated.get('reason', 'ended')}, exit code {terminated['exitCode']}{error}"


def _cancel(cluster: Cluster, name: str) -> None:
    """Delete the job; a second time if it was not there yet, since the request that makes it may be under way."""
    try:
        if not cluster.delete(name, patience=_CANCEL_SECONDS):
            time.sleep(1)
            cluster.delete(name, patience=_CANCEL_SECONDS / 2)
    except SkdError as error:
        command = f"kubectl delete trainjob {name} -n {cluster.namespace}"
        log.error("the TrainJob could not be deleted and goes on; `%s`: %s", command, error)


def _collect(exchange: Exchange, io: StepIO, work: Work) -> None:
    """Fetch the nodes' outputs and write them as this step's own."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / EXECUTOR_OUTPUT
        exchange.fetch({name: io.paths[name] for name in work.outputs.values()}, file)
        written = json.loads(file.read_text(encoding="utf-8"))
    for parameter, value in written["parameterValues"].items():
        io.parameter(parameter, value)
    io.write()


class Terminated(BaseException):
    """SIGTERM, at any place of this process."""


@contextmanager
def sigterm_raises() -> Iterator[None]:
    """Let SIGTERM end any waiting; further ones change nothing."""

    def received(_number: int, _frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise Terminated

    before = signal.signal(signal.SIGTERM, received)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
