"""When the cluster tries a step again: what the profiles ask for, under the three settings of Argo that were seen."""

from __future__ import annotations

from typing import Any

import pytest

from skd_kfp.pipelines.compiling import PIPELINES
from tests.kubeflow.backend.retries import DELETED, FAILED, REMEDY, STOCK, Attempt, Strategy, attempts
from tests.kubeflow.test_backend_runs import documents

HOUR, DAY = 3600.0, 86400.0
CLUSTERS = {"plain Argo": None, "manifests of 2.17.0": STOCK, "the remedy": REMEDY}


def of_task(task: dict[str, Any]) -> Strategy:
    """The strategy that a compiled task asks for."""
    policy = task["retryPolicy"]
    factor = float(policy.get("backoffFactor", 2))
    assert factor.is_integer(), "Argo reads a whole number"
    seconds = [float(policy[name].rstrip("s")) for name in ("backoffDuration", "backoffMaxDuration")]
    return Strategy(int(policy["maxRetryCount"]), seconds[0], int(factor), seconds[1])


def retried() -> dict[str, Strategy]:
    """All tasks of the pipelines that are tried again."""
    return {
        f"{name} {key}": of_task(task)
        for name in PIPELINES
        for component in [documents(name)[0]["root"], *documents(name)[0]["components"].values()]
        for key, task in component.get("dag", {}).get("tasks", {}).items()
        if "retryPolicy" in task
    }


def test_training_is_tried_again_after_days() -> None:
    """Commit 9e44b4e: no step was tried again ten minutes after its first attempt's start, waiting included."""
    strategies = retried()
    assert {"distillation distill", "distillation teacher-sft", "compare_methods distill"} <= strategies.keys()
    for task, strategy in strategies.items():
        assert attempts(strategy, [Attempt(FAILED, 3 * DAY), Attempt("", 3 * DAY)]) == (2, ""), task


@pytest.mark.parametrize(
    ("cluster", "end", "expected"),
    [
        ("plain Argo", FAILED, 2),
        ("plain Argo", DELETED, 1),
        ("manifests of 2.17.0", FAILED, 1),
        ("manifests of 2.17.0", DELETED, 2),
        ("the remedy", FAILED, 2),
        ("the remedy", DELETED, 2),
    ],
)
def test_what_a_cluster_tries_again(cluster: str, end: str, expected: int) -> None:
    """All seen. FAILED is an exit code, OOM or eviction: the launcher makes each exit code 1."""
    strategy = retried()["distillation distill"].under(CLUSTERS[cluster])
    assert attempts(strategy, [Attempt(end, HOUR), Attempt("", HOUR)])[0] == expected


def test_the_remedy_gives_each_step_its_own_number() -> None:
    tries = [Attempt(FAILED, 1.0)] * 9
    assert attempts(Strategy(limit=2, within=14 * DAY).under(REMEDY), tries) == (3, "No more retries left")
    assert attempts(REMEDY, tries) == (1, "No more retries left")


def test_a_limit_of_minutes_leaves_no_retry() -> None:
    short = Strategy(limit=2, within=600.0)
    assert attempts(short, [Attempt(FAILED, 700.0), Attempt("")]) == (1, "Max duration limit exceeded")
    assert attempts(short, [Attempt(FAILED, 300.0), Attempt("", 400.0)]) == (2, "Step exceeded its deadline")
