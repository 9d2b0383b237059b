"""When Argo tries a step again (argo-workflows 4.0.8, workflow/controller/operator.go, `processNodeRetries`)."""

from __future__ import annotations

from dataclasses import dataclass

FAILED, ERROR, DELETED = "Failed", "Error", "Deleted"
"""How an attempt ends: exit code, OOM or eviction; an error of Argo's; its pod deleted, which is an error, too."""


@dataclass(frozen=True)
class Strategy:
    """What a task's template says.

    Attributes:
        limit: Attempts after the first.
        wait: Seconds before the second attempt; times `factor` before each later one.
        within: Seconds from the start of the first attempt, waiting for a node included. 0: no limit.
        policy: Empty as KFP writes it: then OnFailure.
    """

    limit: int = 0
    wait: float = 60.0
    factor: int = 2
    within: float = 0.0
    policy: str = ""

    def under(self, defaults: Strategy | None) -> Strategy:
        """Merge the cluster's `templateDefaults`: what the template says stays, the policy is filled in.

        The manifests of Kubeflow Pipelines 2.17.0 have limit 2 and OnError (manifests/kustomize/third-party/argo/base/
        workflow-controller-configmap-patch.yaml), so that exit codes, OOM and evictions are not tried again (seen).
        """
        return Strategy(
            self.limit, self.wait, self.factor, self.within, self.policy or (defaults.policy if defaults else "")
        )


STOCK = Strategy(limit=2, policy="OnError")
"""The defaults of the manifests of 2.17.0."""
REMEDY = Strategy(limit=0, policy="Always")
"""What makes the steps' own limits hold (seen: `set_retry(2)` gives three attempts, nothing else is repeated)."""


@dataclass(frozen=True)
class Attempt:
    """One attempt: how it ended, and the seconds it waited for a node and ran."""

    end: str = ""  # empty: it went well
    seconds: float = 0.0


def attempts(strategy: Strategy, tries: list[Attempt]) -> tuple[int, str]:
    """Count the attempts that are made, and say how the last one ended.

    All rules were seen but that on `factor`. A retry that runs beyond `within` is killed at that moment.

    Args:
        strategy: Of the step, merged with the cluster's.
        tries: What would happen, in order.
    """
    policy = strategy.policy or "OnFailure"
    clock = 0.0
    for count, attempt in enumerate(tries, start=1):
        clock += attempt.seconds
        if count > 1 and strategy.within and clock > strategy.within:
            return count, "Step exceeded its deadline"
        if not attempt.end:
            return count, ""
        if strategy.within and clock > strategy.within:
            return count, "Max duration limit exceeded"
        clock += strategy.wait * strategy.factor ** (count - 1)
        if strategy.within and clock > strategy.within:
            return count, "Backoff would exceed max duration limit"
        repeated = policy == "Always" or (attempt.end == FAILED) == (policy == "OnFailure")
        if not repeated:
            return count, attempt.end
        if count > strategy.limit:
            return count, "No more retries left"
    return len(tries), tries[-1].end
