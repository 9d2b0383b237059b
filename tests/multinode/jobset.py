"""When the nodes of a job start again: the rules of Kubernetes' Job controller and of JobSet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass
class Nodes:
    """All nodes of one job, by a runtime.

    Attributes:
        runtime: The manifest.
        nodes: How many there are.
        restarts: Of all nodes together.
        container_restarts: Of single containers, summed over the nodes.
    """

    runtime: Mapping[str, Any]
    nodes: int
    restarts: int = 0
    container_restarts: int = 0

    def fail(self, codes: Sequence[int]) -> str:
        """Return why the job has failed for good once nodes have ended with these codes; empty: all start again."""
        jobs = self.runtime["spec"]["template"]["spec"]
        (replicated,) = jobs["replicatedJobs"]
        reason = self._job(replicated["template"]["spec"], codes)
        return self._jobset(jobs, reason) if reason else ""

    def _job(self, job: Mapping[str, Any], codes: Sequence[int]) -> str:
        """Why the Job has failed, by the order of `syncJob` (Kubernetes, pkg/controller/job/job_controller.go)."""
        for rule in job.get("podFailurePolicy", {}).get("rules", []):
            if rule["action"] == "FailJob" and set(codes) & set(rule["onExitCodes"]["values"]):
                return "PodFailurePolicy"
        limit = job.get("backoffLimit", 6)
        # JobSet 0.11.1's webhook: `OnFailure`, where the runtime does not say.
        if job["template"]["spec"].get("restartPolicy", "OnFailure") == "Never":
            return "BackoffLimitExceeded" if len(codes) > limit else ""
        # Seen on Kubernetes 1.35.4: where one node fails, every node's container ends and starts again.
        self.container_restarts += self.nodes
        return "BackoffLimitExceeded" if self.container_restarts >= limit else ""

    def _jobset(self, jobs: Mapping[str, Any], reason: str) -> str:
        """Why the JobSet has failed (JobSet 0.10.1 to 0.12.0, pkg/controllers/failure_policy.go)."""
        policy = jobs.get("failurePolicy")
        if policy is None:
            return "FailedJobs"
        for rule in policy.get("rules", []):
            if reason in rule["onJobFailureReasons"]:
                assert rule["action"] == "FailJobSet"
                return "FailJobSetFailurePolicyAction"
        if self.restarts >= policy["maxRestarts"]:
            return "ReachedMaxRestarts"
        self.restarts += 1
        return ""
