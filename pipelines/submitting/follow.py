"""Following a run in the cluster to its end."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from pipelines.graph import Step
from pipelines.progress import Display
from pipelines.submitting.api import LIVE, KubeflowPipelines

SUCCEEDED, SKIPPED = "SUCCEEDED", "SKIPPED"
POLL_SECONDS = 10.0


def follow(
    api: KubeflowPipelines, run_id: str, steps: Sequence[Step], display: Display, poll: float = POLL_SECONDS
) -> Any:
    """Show a run's steps as they start and end, until it has ended.

    Returns:
        The run as it ended.

    Raises:
        SkdError: the server cannot be reached for minutes, or no longer accepts our credentials; the run goes on.
    """
    shown = _Shown({step.component: step.name for step in steps}, display)
    with display:
        while True:
            run = api.run(run_id)
            for task in _tasks(run):
                shown.update(task)
            if run.state not in LIVE:
                return run
            time.sleep(poll)


def failures(run: Any, steps: Sequence[Step]) -> list[str]:
    """Which steps of a run failed and what is known of why: `distill (pod skd-x-1): exit code 1`."""
    names = {step.component: step.name for step in steps}
    return [
        f"{names[task.display_name]}{_pod(task)}: {(task.error and task.error.message) or task.state.lower()}"
        for task in _tasks(run)
        if task.display_name in names and task.state not in LIVE | {SUCCEEDED, SKIPPED}
    ]


class _Shown:
    """What has been shown of each step. A step tried again starts again."""

    def __init__(self, names: dict[str, str], display: Display) -> None:
        self._names, self._display = names, display
        self._states: dict[str, str | None] = {}

    def update(self, task: Any) -> None:
        name = self._names.get(task.display_name)
        if name is None or self._states.get(name) == task.state or task.state in LIVE - {"RUNNING"}:
            return
        if self._states.get(name) != "RUNNING" and task.state != SKIPPED:
            self._display.started(name)
        self._states[name] = task.state
        seconds = _seconds(task)
        if task.state == SUCCEEDED:
            self._display.finished(name, seconds, reused=False)
        elif task.state == SKIPPED:
            self._display.finished(name, seconds, reused=True)
        elif task.state != "RUNNING":
            self._display.failed(name, seconds)


def _tasks(run: Any) -> list[Any]:
    return (run.run_details and run.run_details.task_details) or []


def _seconds(task: Any) -> float:
    start = task.start_time or task.create_time
    return float((task.end_time - start).total_seconds()) if start and task.end_time else 0.0


def _pod(task: Any) -> str:
    pods = [task.pod_name, *(child.pod_name for child in task.child_tasks or [])]
    return next((f" (pod {pod})" for pod in pods if pod), "")
