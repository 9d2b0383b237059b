"""Follow a run in the cluster to its end."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from skd_kfp.pipelines.graph import Step
from skd_kfp.pipelines.kubeflow.api import KubeflowPipelines
from skd_kfp.pipelines.kubeflow.states import (
    CANCELING,
    FAILED,
    REUSED,
    RUNNING,
    SKIPPED,
    SUCCEEDED,
    StepState,
    is_live,
    iterations_of,
    read_states,
    was_cancelled,
)
from skd_lib._core.format import duration

POLL_SECONDS = 10.0


@dataclass(frozen=True)
class Followed:
    """A run that has ended, as the API returns it, and its steps; a person may have cancelled it."""

    run: Any
    cancelled: bool
    states: list[StepState]

    @property
    def succeeded(self) -> bool:
        """True if it succeeded."""
        return bool(self.run.state == SUCCEEDED)


def follow(
    api: KubeflowPipelines,
    run_id: str,
    spec: dict[str, Any],
    steps: Sequence[Step],
    say: Callable[[str], None],
    poll: float = POLL_SECONDS,
) -> Followed:
    """Print the start and end of a run's steps until the run has ended."""
    shown = _Shown(steps, say)
    cancelled = False
    while True:
        run = api.run(run_id)
        states = read_states(run, spec, steps)
        shown.update(states)
        # The server forgets that it was cancelling a run which ends before it has looked at it again.
        cancelled = cancelled or run.state == CANCELING or was_cancelled(run)
        if not is_live(run):
            break
        time.sleep(poll)
    if any(state.state == RUNNING for state in states):  # the server writes a run's end before its tasks' ends
        time.sleep(poll)
        run = api.run(run_id)
        states = read_states(run, spec, steps)
        shown.update(states)
    return Followed(run, cancelled=cancelled and run.state != SUCCEEDED, states=states)


def ending(followed: Followed, namespace: str) -> list[str]:
    """Return how a run ended, and where to look: a line for the run, then a line for each part of it."""
    namespace = namespace or "kubeflow"
    lost = [state.name for state in followed.states if state.state == RUNNING]
    pods = f"kubectl get pods -n {namespace} -l pipeline/runid={followed.run.run_id}"
    unknown = (
        f"Kubeflow no longer records the steps of this run, since its record has grown beyond 1 MiB; "
        f"not known to have ended: {', '.join(lost)}"
    )
    if followed.succeeded:
        return ["the run succeeded", *([unknown] if lost else [])]
    if followed.cancelled:
        stopped = [state.name for state in followed.states if state.state in {FAILED, RUNNING}]
        return ["the run was cancelled", *([f"stopped: {', '.join(stopped)}"] if stopped else [])]
    failed = [_failure(state, namespace) for state in followed.states if state.state == FAILED]
    if not failed:
        failed = [f"{unknown}; look at `{pods}`" if lost else f"Kubeflow names no step that failed: look at `{pods}`"]
    why = (followed.run.error and followed.run.error.message) or ""
    return [f"the run ended as {followed.run.state}{': ' if why else ''}{why}", *failed]


def _failure(state: StepState, namespace: str) -> str:
    log = f": {state.message}" if state.message else ""
    log += f"; its log: `kubectl logs -n {namespace} {state.pod} -c main`" if state.pod else ""
    if state.driver:
        return f"{state.name} was not started: Kubeflow's driver for it failed{log}"
    tried = f" in attempt {state.attempts}" if state.attempts > 1 else ""
    return f"{state.name} failed{tried} after {duration(state.seconds)}{log}"


class _Shown:
    """Prints the changes of each step's state."""

    def __init__(self, steps: Sequence[Step], say: Callable[[str], None]) -> None:
        self._steps, self._say = steps, say
        self._said: dict[str, StepState] = {}

    def update(self, states: Sequence[StepState]) -> None:
        for state in states:
            before = self._said.get(state.name)
            self._said[state.name] = state
            if before is None or before.state != state.state:
                self._changed(state, before)
            elif state.state == RUNNING and state.attempts > max(before.attempts, 1):
                self._line(f"{state.name}: attempt {state.attempts} ...", running=True)

    def _changed(self, state: StepState, before: StepState | None) -> None:
        again = " again" if before is not None and before.state not in {RUNNING, SKIPPED} else ""
        match state.state:
            case "RUNNING":
                self._line(f"{state.name}{again} ...", running=True)
            case "SUCCEEDED":
                tried = f" in attempt {state.attempts}" if state.attempts > 1 else ""
                self._line(f"{state.name}: done{tried} in {duration(state.seconds)}")
            case "REUSED":
                self._line(f"{state.name}: unchanged, reused")
            case "FAILED" if state.driver:
                self._line(f"{state.name}: NOT STARTED, Kubeflow's driver for it failed", running=True)
            case "FAILED":
                self._line(f"{state.name}: FAILED after {duration(state.seconds)}", running=True)

    def _line(self, text: str, *, running: bool = False) -> None:
        """Print a line with the number of finished steps, the running one included, and the number of known steps."""
        rounds = iterations_of(self._said.values())
        once = sum(not step.loop for step in self._steps)
        total = once + sum(max(rounds.get(step.loop, 1), 1) for step in self._steps if step.loop)
        done = sum(state.state in {SUCCEEDED, REUSED} for state in self._said.values())
        self._say(f"[{min(done + running, total)}/{total}] {text}")
