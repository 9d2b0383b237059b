"""Run the compiled pipeline on this machine, its steps as child processes or containers, in a folder of its own."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import sys
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import skd_lib
from skd_kfp.pipelines.graph import Step, read_steps, unrolled
from skd_kfp.pipelines.local import stopping
from skd_kfp.pipelines.local.containers import Containers
from skd_kfp.pipelines.local.folder import RunFolder
from skd_kfp.pipelines.local.process import OnEvent, Outcome, Start, StepFailed, run_logged
from skd_kfp.pipelines.local.progress import Display
from skd_kfp.pipelines.local.reuse import local_pipeline, run_identity, source_digest
from skd_lib._core import events
from skd_lib._core.bugs import explained
from skd_lib._core.machine import usable_cores
from skd_lib._core.uris import redacted
from skd_lib.comparison.plan import Plan
from skd_lib.comparison.plan import to_parameters as comparison_parameters
from skd_lib.config import RunConfig
from skd_lib.config.parameters import short, to_parameters
from skd_lib.errors import SkdError, is_full_disk
from skd_lib.tracking.outbox import FOLDER_VARIABLE, read_location, waiting_files

CODE_VERSION = "SKD_CODE_VERSION"
"""Variable that says which code a step runs; images have it from their build."""


@dataclass
class LocalRun:
    """A run in progress: runs each step and keeps its outputs and times.

    A component in a loop is named with the number of its round, see `graph.round_key`. `outputs` (parameters and
    artifact URIs) and `taken` (seconds; of a reused step those of its original run) are by step name. After `failure`
    no step is started but the exit handler; after one in `lost`, by the round's name, the other rounds of the loop go
    on, what comes after it does not.
    """

    folder: RunFolder
    steps: Mapping[str, Step]
    display: Display
    start: Start
    outputs: dict[str, dict[str, Any]] = field(default_factory=dict)
    taken: dict[str, float] = field(default_factory=dict)
    reused_steps: set[str] = field(default_factory=set)
    failure: StepFailed | None = None
    lost: dict[str, StepFailed] = field(default_factory=dict)
    outcome: str = ""

    def execute(
        self, component: str, image: str, command: list[str], env: Mapping[str, str], task_folder: Path
    ) -> bool:
        """Run one container to its end, and return whether it succeeded."""
        step = self.steps[component]
        if self.failure and not step.is_exit:
            return False
        stopping.check()
        self.display.started(step.name)
        start = time.monotonic()
        log = self.folder.logs / f"{step.name}.log"
        try:
            log.write_text("", encoding="utf-8")
            task_folder.mkdir(parents=True, exist_ok=True)
            outcome = self.start(image, command, env, log, lambda event: self._on_event(step.name, event))
        except OSError as error:
            outcome = Outcome(1, str(explained(error)), ())
        stopping.check()
        seconds = time.monotonic() - start
        if outcome.code != 0:
            self.display.failed(step.name, seconds)
            failure = StepFailed(step.name, outcome.explain(), log, outcome.code)
            if step.iteration:
                self.lost[step.iteration] = failure
            else:
                self.failure = self.failure or failure
            return False
        self.taken[step.name] = seconds
        self.outputs[step.name] = _read_outputs(task_folder)
        self.display.finished(step.name, seconds, reused=False)
        return True

    def reused(self, component: str, outputs: Mapping[str, Any], seconds: float) -> None:
        """Record that a step's outputs came from the cache; `seconds` is the time of the original run."""
        step = self.steps[component]
        self.taken[step.name] = seconds
        self.outputs[step.name] = dict(outputs)
        self.reused_steps.add(step.name)
        self.display.finished(step.name, seconds, reused=True)

    def seconds(self, component: str) -> float:
        """Return the seconds of a step that has just run."""
        return self.taken[self.steps[component].name]

    def _on_event(self, step: str, event: Mapping[str, Any]) -> None:
        if event["event"] == "progress":
            self.display.progress(step, event)
        elif event["event"] == "note":
            self.display.note(f"{step}: {event['message']}")
        elif event["event"] == "outcome":
            self.outcome = event["message"]

    def durations(self) -> dict[str, float]:
        """Return the seconds of every finished step, in the pipeline's order."""
        return {step.name: round(self.taken[step.name], 2) for step in self.steps.values() if step.name in self.taken}


def step_environment(
    run_id: str, *, tracking_uri: str = "", experiment: str = "", checkpoint_root: str = ""
) -> dict[str, str]:
    """Return the environment of every step: run id, stores, events, and all cores (one step runs at a time)."""
    defaults = {
        "OMP_NUM_THREADS": str(usable_cores()),
        "GOMP_SPINCOUNT": "2000",  # waiting threads sleep soon, which keeps a step fast on a busy machine
        "TOKENIZERS_PARALLELISM": "false",
        "TQDM_DISABLE": "1",  # bars of libraries would fill the logs; the steps report their progress themselves
    }
    return {
        **{name: os.environ.get(name, value) for name, value in defaults.items()},
        "KFP_RUN_ID": run_id,
        "SKD_TRACKING_URI": tracking_uri,
        "SKD_EXPERIMENT": experiment,
        "SKD_CHECKPOINT_ROOT": checkpoint_root,
        "PYTHONUNBUFFERED": "1",
        events.ENV: "1",
    }


def child_processes(settings: Mapping[str, str]) -> Start:
    """Return what runs steps as child processes, in this process's environment and `settings`.

    Steps import the library that this process runs, from whatever folder it was started.
    """
    library = str(Path(skd_lib.__file__).parent.parent)
    path = os.pathsep.join(filter(None, [library, os.environ.get("PYTHONPATH")]))
    # PYTHONSAFEPATH: no imports from the current folder, where people have folders `pipelines` and files `datasets.py`.
    code = {CODE_VERSION: f"{skd_lib.__version__}, sources {source_digest()[:16]}"}
    ours = {**code, **os.environ, **settings, "PYTHONPATH": path, "PYTHONSAFEPATH": "1"}

    def start(image: str, command: list[str], env: Mapping[str, str], log: Path, on_event: OnEvent) -> Outcome:  # noqa: ARG001
        return run_logged([sys.executable, *command[1:]], log=log, env={**ours, **env}, on_event=on_event)

    return start


def run_pipeline(
    config: RunConfig,
    folder: RunFolder,
    documents: list[dict[str, Any]],
    display: Display,
    *,
    tracking_uri: str,
    experiment: str,
    fresh: bool = False,
    comparison: Plan | None = None,
    containers: Containers | None = None,
) -> LocalRun:
    """Run the compiled pipeline `documents` for `config` in `folder`.

    `fresh` forgets finished steps and checkpoints; the trials of a `comparison` start from `config`. Where rounds of
    the loop failed (`lost`) the run is returned without what comes after it. Raises StepFailed with the step's own
    message, and KeyboardInterrupt once the running step was stopped.
    """
    from skd_kfp.pipelines.local.kfp_patch import run_locally

    with folder.locked():
        if tracking_uri and waiting_files(str(folder.records)):
            from skd_lib.tracking.outbox import resend

            resend(str(folder.records), tracking_uri)
        if fresh:
            folder.forget()
        local = local_pipeline(documents, containers.images if containers else None)
        trials = comparison.trials if comparison else ()
        identity = run_identity(config, local[0], map(short, trials))
        settings = step_environment(
            folder.run_id(config, identity, fresh=fresh),
            tracking_uri=tracking_uri,
            experiment=experiment,
            checkpoint_root=str(folder.checkpoints),
        )
        settings[FOLDER_VARIABLE] = os.environ.get(FOLDER_VARIABLE) or str(folder.records)
        steps = {step.component: step for step in unrolled(read_steps(local[0]), [trial.label for trial in trials])}
        start = containers.starter(settings) if containers else child_processes(settings)
        form = comparison_parameters(comparison.compare, config) if comparison else to_parameters(config)
        arguments = {**form, "mlflow_experiment": experiment}
        folder.kfp_log.write_text("", encoding="utf-8")
        with display:
            run = LocalRun(folder, steps, display, start)
            try:
                run_locally(local, arguments, run, containers=containers is not None)
            except Exception as error:
                if run.failure:
                    raise run.failure from error
                if isinstance(error, OSError) or is_full_disk(error):
                    raise explained(error) from error
                with folder.kfp_log.open("a", encoding="utf-8") as file:
                    file.write(redacted(traceback.format_exc()))
                raise SkdError(
                    f"kfp could not run the pipeline: {type(error).__name__}: {error}",
                    hint=f"kfp's own log is {folder.kfp_log}",
                ) from error
            finally:
                _report_records(folder, display)
        if run.failure:
            raise run.failure
        return run


def _report_records(folder: RunFolder, display: Display) -> None:
    """Show which steps' records MLflow has not taken."""
    if files := waiting_files(str(folder.records)):
        steps: list[str] = []
        for file in files:
            with contextlib.suppress(SkdError):
                steps.append(read_location(Path(file)).step)
        named = ", ".join(sorted(set(steps))) or "a step"
        display.note(
            f"MLflow has not taken the records of {named}, which wait in {folder.records}. "
            "Once it answers, run the same command again, or "
            f"`skd track replay {shlex.quote(str(folder.records))}/*.jsonl`"
        )


def _read_outputs(task_folder: Path) -> dict[str, Any]:
    """Return the parameters and artifact URIs that a step wrote to KFP's executor output."""
    file = task_folder / "executor_output.json"
    if not file.is_file():
        return {}
    output = json.loads(file.read_text(encoding="utf-8"))
    uris = {name: value["artifacts"][0]["uri"] for name, value in output.get("artifacts", {}).items()}
    return {**output.get("parameterValues", {}), **uris}
