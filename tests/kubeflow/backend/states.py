"""How DAGs get their last state, of which `finish` is told."""

from __future__ import annotations

from tests.kubeflow.backend.records import Execution
from tests.kubeflow.backend.versions import Version

_DONE = ("COMPLETE", "CACHED", "CANCELED")


def published(execution: Execution, version: Version, *, by_driver: bool = False) -> None:
    """Count a DAG's tasks, after one of them has a new state.

    With ML Metadata only a step's launcher counts (component/launcher_v2.go, `Execute`): not the driver of a cached
    step or of a branch that is not taken, nor a step that died. What ends in such a way after the last launcher of its
    DAG is never counted, and the DAG stays RUNNING (2.17.0: seen; 2.16.1: seen with nested conditions). A failed
    attempt makes the DAG FAILED until a later attempt's launcher counts again.
    """
    if version.metadata and by_driver:
        return
    dag = execution.parent
    while dag is not None and dag.parent is not None:  # the root has no counts
        state = _with_metadata(dag, version) if version.metadata else _without(dag)
        if not state:
            return
        dag.state = state
        if not version.states_climb:
            return
        dag = dag.parent


def _with_metadata(dag: Execution, version: Version) -> str:
    """`UpdateDAGExecutionsState` of backend/src/v2/metadata/client.go."""
    states = [child.state for child in dag.children]
    if sum(state in _DONE for state in states) == (dag.total if version.loops_counted or not dag.is_loop else -1):
        return "COMPLETE"
    return "FAILED" if "FAILED" in states else ""


def _without(dag: Execution) -> str:
    """`updateStatuses` of backend/src/v2/apiclient/kfpapi/api.go, in pull request 13986."""
    states = [child.state for child in dag.children]
    if "FAILED" in states:
        dag.message = next(child.message for child in dag.children if child.state == "FAILED")
        return "FAILED"
    if "RUNNING" in states or len(states) < dag.total:
        return ""
    return next((word for word in ("CACHED", "SKIPPED") if set(states) == {word}), "SUCCEEDED")
