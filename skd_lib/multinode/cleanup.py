"""Delete the jobs and vLLM servers that killed steps of a pipeline run have left behind.

A step that gets SIGTERM deletes them itself. One whose pod is killed at once (memory, a lost machine) cannot, and if
it is not tried again, the run ends while they go on. All steps have ended when the exit handler looks.
"""

from __future__ import annotations

import logging
import os
import time
from typing import TYPE_CHECKING

from skd_lib._core.machine import POD_VARIABLE
from skd_lib.errors import SkdError

if TYPE_CHECKING:
    from skd_lib.multinode.cluster import Cluster

log = logging.getLogger(__name__)
DEADLINE_SECONDS = 60.0  # a request takes half a minute at most
SERVERS_SECONDS = 5.0
"""For servers: Kubernetes has been asked for jobs just before."""


def delete_abandoned(run_id: str, seconds: float = DEADLINE_SECONDS) -> list[str]:
    """Delete a pipeline run's jobs that have not ended, once all of the run's steps have; return their names.

    An answer of Kubernetes that prevents it is logged, and is no error; after `seconds` nothing is asked again. A
    deleted job's exchange folder stays, from which a retry takes a result that was ready.
    """
    if not run_id or not os.environ.get(POD_VARIABLE):
        return []  # elsewhere there may be a KUBECONFIG, but none of this run's jobs
    from skd_lib.multinode.cluster import Cluster, Refused

    deadline = time.monotonic() + seconds
    try:
        cluster = Cluster.connect()
        jobs = cluster.jobs(run_id, patience=seconds)
    except SkdError as error:
        status = error.status if isinstance(error, Refused) else None
        if status == 404:
            log.info("this cluster has no TrainJobs, so this run has left none")
        elif status == 403:
            # The usual answer for a namespace without training on several nodes: no reason to warn.
            log.info("no TrainJobs are looked for; a run with `multinode` may have left some: %s", error)
        else:
            log.warning("whether this run's TrainJobs go on is not known: %s", error.brief)
        return []
    return _delete(cluster, [name for name, state in jobs.items() if state.phase == "running"], deadline)


def delete_abandoned_servers(run_id: str, seconds: float = SERVERS_SECONDS) -> list[str]:
    """Delete a pipeline run's vLLM servers, once all of the run's steps have ended; return their names.

    An answer of Kubernetes that prevents it is logged, and is no error; after `seconds` nothing is asked again.
    """
    if not run_id or not os.environ.get(POD_VARIABLE):
        return []
    from skd_lib.multinode.cluster import Refused
    from skd_lib.multinode.servers import connect, delete_left_behind

    try:
        return delete_left_behind(connect(), run_id, seconds, ended=True)
    except SkdError as error:
        if isinstance(error, Refused) and error.status == 403:
            # The usual answer for a namespace without such servers: no reason to warn.
            log.info("no vLLM servers are looked for; a run with `distill.vllm.pods` may have left some: %s", error)
        else:
            log.warning("whether this run's vLLM servers go on is not known: %s", error.brief)
        return []


def _delete(cluster: Cluster, names: list[str], deadline: float) -> list[str]:
    """Delete jobs one after the other, as long as Kubernetes answers; return the deleted ones."""
    from skd_lib.multinode.cluster import Refused

    deleted = []
    for number, name in enumerate(names):
        try:
            if cluster.delete(name, patience=max(0.0, deadline - time.monotonic())):
                log.info("deleted the TrainJob %s, for which no step was waiting any more", name)
                deleted.append(name)
        except SkdError as error:
            silent = not isinstance(error, Refused)
            left = " ".join(names[number:] if silent else [name])
            command = f"kubectl delete trainjob {left} -n {cluster.namespace}"
            log.warning("TrainJobs still run and no step waits for them; `%s`: %s", command, error.brief)
            if silent:
                break
    return deleted
