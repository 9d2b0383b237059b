"""The same pipeline on this machine: child processes or containers, artifacts in a folder, finished steps reused.

runs/<name>/
  config.yaml     the configuration of the last run
  run.json        the run's id, kept while configuration, data, models and code stay the same
  logs/           one file a step, kfp's own, and that of the process that steps are forks of
  artifacts/      what the steps wrote
  checkpoints/    training goes on from here after an interruption
  tracking/       what MLflow has not taken yet
  .cache/         which outputs belong to which inputs
  report.html     the page
  summary.json    the figures on it
  samples.jsonl   the training sequences on it
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import shlex
import shutil
import sys
import time
import traceback
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import filelock
import yaml

import skd_lib
from skd_kfp.pipelines.compiling import set_image
from skd_kfp.pipelines.graph import STEPS, Step, read_steps, unrolled
from skd_kfp.pipelines.local import stopping
from skd_kfp.pipelines.local.containers import Containers
from skd_kfp.pipelines.local.forking import ForkServer, can_fork
from skd_kfp.pipelines.local.identity import Identity, is_same, run_identity
from skd_kfp.pipelines.local.process import OnEvent, Outcome, Start, StepFailed, run_logged, watch
from skd_kfp.pipelines.local.progress import Display
from skd_lib._core import events
from skd_lib._core.bugs import explained
from skd_lib._core.machine import usable_cores
from skd_lib._core.uris import redacted
from skd_lib.comparison.plan import Plan
from skd_lib.comparison.plan import to_parameters as comparison_parameters
from skd_lib.config import RunConfig
from skd_lib.config.parameters import short, to_parameters, to_struct
from skd_lib.errors import SkdError, is_full_disk
from skd_lib.report.sources import PAGE, SUMMARY
from skd_lib.steps.kfp_call import OUTPUT_FILE, OUTPUT_FILE_OPTION
from skd_lib.storage import write_text_atomic
from skd_lib.tracking.buffer import FOLDER_VARIABLE, read_place, waiting_files


@dataclass(frozen=True)
class RunFolder:
    """Where one run keeps its things."""

    root: Path

    @classmethod
    def create(cls, runs: Path, name: str) -> RunFolder:
        """Make the folder of run `name`.

        Raises:
            SkdError: it cannot be written.
        """
        folder = cls((runs / name).resolve())
        try:
            for path in (folder.logs, folder.artifacts, folder.cache, folder.checkpoints):
                path.mkdir(parents=True, exist_ok=True)
            write_text_atomic(folder.root / ".writable", "")
            (folder.root / ".writable").unlink()
        except OSError as error:
            raise SkdError(
                f"cannot write the run's folder: {error.strerror}",
                where=str(folder.root),
                hint="choose another with --runs-dir, or change its permissions",
            ) from error
        return folder

    @property
    def logs(self) -> Path:
        """One log a step."""
        return self.root / "logs"

    @property
    def artifacts(self) -> Path:
        """What the steps wrote."""
        return self.root / "artifacts"

    @property
    def checkpoints(self) -> Path:
        """Where training goes on from."""
        return self.root / "checkpoints"

    @property
    def cache(self) -> Path:
        """Which outputs belong to which inputs."""
        return self.root / ".cache"

    @property
    def records(self) -> Path:
        """What steps have left for MLflow, which did not take it."""
        return self.root / "tracking"

    @property
    def summary(self) -> Path:
        """The run's figures."""
        return self.root / SUMMARY

    @property
    def page(self) -> Path:
        """The run's page."""
        return self.root / PAGE

    def log_of(self, step: str) -> Path:
        """The log of one step."""
        return self.logs / f"{step}.log"

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other runs out of the folder.

        Raises:
            SkdError: another run is in it.
        """
        lock = filelock.FileLock(self.root / ".lock", blocking=False)
        try:
            lock.acquire()
        except filelock.Timeout as error:
            raise SkdError(
                "another `skd run` or `skd compare` is using this folder",
                where=str(self.root),
                hint="wait for it, or give this run another `name`",
            ) from error
        try:
            yield
        finally:
            lock.release()

    def link(self, name: str, target: Path) -> Path:
        """Point `name` in this folder at one of the artifacts.

        Returns:
            The link, or the artifact itself where the file system has no links.
        """
        link, new = self.root / name, self.root / f".{name}.new"
        try:
            new.unlink(missing_ok=True)
            new.symlink_to(os.path.relpath(target, self.root), target_is_directory=True)
            new.replace(link)
        except OSError:
            return target
        return link

    def gather_records(self) -> list[str]:
        """What waits for MLflow, also where earlier versions had training steps leave it: among the checkpoints."""
        for file in waiting_files(str(self.checkpoints / "tracking")):
            self.records.mkdir(exist_ok=True)
            Path(file).rename(self.records / Path(file).name)
        return waiting_files(str(self.records))

    def forget(self) -> None:
        """Drop cache and checkpoints; artifacts stay, since registered models live there."""
        for path in (self.cache, self.checkpoints):
            shutil.rmtree(path, ignore_errors=True)
            path.mkdir()

    def run_id(self, config: RunConfig, identity: Identity, *, fresh: bool) -> str:
        """The run's id in MLflow: the same while its identity is, so that a resumed run goes on in its records.

        Args:
            config: The run.
            identity: See `run_identity`.
            fresh: Make another one.
        """
        file = self.root / "run.json"
        known = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        before: Identity = known.get("identity", {})
        if fresh or not is_same(before, identity):
            known = {"run_id": str(uuid.uuid4())}
            before = {}
            write_text_atomic(self.root / "config.yaml", yaml.safe_dump(to_struct(config), sort_keys=False))
        known["identity"] = {**before, **{name: text or before.get(name, "") for name, text in identity.items()}}
        write_text_atomic(file, json.dumps(known, indent=2) + "\n")
        return str(known["run_id"])


@dataclass
class LocalRun:
    """A run in progress: runs each step and keeps account.

    Attributes:
        start: Runs a step: as a child process, or as a container.
        outputs: Output parameters and artifact URIs of every finished step, by step name.
        taken: Seconds of every finished step; of a reused one, those of its original run.
        reused_steps: Steps whose outputs came from the cache.
        failure: The first failure; later steps are not started then, but for the exit handler.
        lost: Failures in a loop, by the round's name: the other rounds go on, what comes after the loop does not.
        outcome: What came of the run in the end (`skd_lib._core.events.outcome`).
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
        """Run one container to its end (see `kfp_local.Executor`)."""
        step = self.steps[component]
        if self.failure and not step.is_exit:
            return False
        stopping.check()
        self.display.started(step.name)
        start = time.monotonic()
        log = self.folder.log_of(step.name)
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
        """A step's outputs came from the cache (see `kfp_local.Executor`)."""
        step = self.steps[component]
        self.taken[step.name] = seconds
        self.outputs[step.name] = dict(outputs)
        self.reused_steps.add(step.name)
        self.display.finished(step.name, seconds, reused=True)

    def seconds(self, component: str) -> float:
        """What the step took that has just run (see `kfp_local.Executor`)."""
        return self.taken[self.steps[component].name]

    def _on_event(self, step: str, event: Mapping[str, Any]) -> None:
        if event["event"] == "progress":
            self.display.progress(step, event)
        elif event["event"] == "note":
            self.display.note(f"{step}: {event['message']}")
        elif event["event"] == "outcome":
            self.outcome = event["message"]

    def durations(self) -> dict[str, float]:
        """Seconds of every finished step, in the pipeline's order."""
        return {step.name: round(self.taken[step.name], 2) for step in self.steps.values() if step.name in self.taken}


def local_pipeline(documents: list[dict[str, Any]], images: Mapping[str, str] | None = None) -> list[dict[str, Any]]:
    """A compiled pipeline as this machine runs it.

    The image's name is part of every cache key. Where steps are child processes, the image is this source tree, and its
    name becomes the tree's digest: changed code runs again. Retries are left out: here a person reads the error, mends
    it and runs again.

    Args:
        documents: The compiled pipeline.
        images: Where steps are containers: what to run for an image, by the pipeline's name for it.
    """
    local = json.loads(json.dumps(documents))
    source = f"local-python/skd:{source_digest()[:16]}"
    spec = local[0]
    for executor in spec["deploymentSpec"]["executors"].values():
        if "container" in executor:
            image = executor["container"]["image"]
            set_image(executor["container"], source if images is None else images.get(image, image))
            options = [OUTPUT_FILE_OPTION, OUTPUT_FILE]
            executor["container"]["args"] = [*executor["container"].get("args", []), *options]
    for component in [spec["root"], *spec["components"].values()]:
        for task in component.get("dag", {}).get("tasks", {}).values():
            task.pop("retryPolicy", None)
    return list(local)


def _images(spec: Mapping[str, Any]) -> list[str]:
    executors = spec["deploymentSpec"]["executors"].values()
    return [executor["container"]["image"] for executor in executors if "container" in executor]


CODE_VERSION = "SKD_CODE_VERSION"
"""Variable that says which code a step runs; images have it from their build."""
_NO_STEP = ("doctor.py", "doctor_kubeflow.py")  # what no step imports, besides command lines


def source_digest() -> str:
    """Digest of the library's source files, without those that no step imports."""
    root = Path(skd_lib.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if path.name == "cli.py" or relative.parts[0] in _NO_STEP:
            continue
        digest.update(str(relative).encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def step_environment(
    run_id: str, *, tracking_uri: str = "", experiment: str = "", checkpoint_root: str = ""
) -> dict[str, str]:
    """What every step finds in its environment: the run's id and places, events on, and all cores: one runs at a time.

    Threads that spin only briefly while they wait keep a step fast beside whatever else the machine does.
    """
    defaults = {
        "OMP_NUM_THREADS": str(usable_cores()),
        "GOMP_SPINCOUNT": "2000",
        "TOKENIZERS_PARALLELISM": "false",
        "TQDM_DISABLE": "1",  # bars of libraries would fill the logs; the steps tell of their progress themselves
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


@contextlib.contextmanager
def child_processes(settings: Mapping[str, str], log: Path) -> Iterator[Start]:
    """Runs steps as child processes in this process's environment and `settings`.

    Steps import the library that this process runs, wherever it was started.

    Args:
        settings: Variables of the environment.
        log: File of the process that steps are forks of, where they can be.
    """
    library = str(Path(skd_lib.__file__).parent.parent)
    path = os.pathsep.join(filter(None, [library, os.environ.get("PYTHONPATH")]))
    # Not what lies where the run was started: people have folders named `pipelines` and files named `datasets.py`.
    code = {CODE_VERSION: f"{skd_lib.__version__}, sources {source_digest()[:16]}"}
    ours = {**code, **os.environ, **settings, "PYTHONPATH": path, "PYTHONSAFEPATH": "1"}
    with contextlib.ExitStack() as stack:

        @functools.cache
        def forks() -> ForkServer:
            return stack.enter_context(ForkServer(ours, log))

        def start(image: str, command: list[str], env: Mapping[str, str], log: Path, on_event: OnEvent) -> Outcome:  # noqa: ARG001
            complete = {**ours, **env}
            match command:
                case ["python3", "-m", module, *arguments] if module.startswith(STEPS) and can_fork():
                    if child := forks().start(module, arguments, complete):
                        return watch(child, log=log, on_event=on_event)
            return run_logged([sys.executable, *command[1:]], log=log, env=complete, on_event=on_event)

        yield start


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

    Args:
        config: The run, which gives most of the pipeline's parameters.
        folder: Its files.
        documents: The pipeline.
        display: Shows its course.
        tracking_uri: MLflow.
        experiment: MLflow's experiment.
        fresh: Forget finished steps and checkpoints.
        comparison: The comparison whose trials the pipeline runs, which start from `config`.
        containers: Run the steps in these, not as child processes.

    Returns:
        The finished run; where rounds of the loop failed (`lost`), without what comes after it.

    Raises:
        StepFailed: a step failed; its own message is in it.
        SkdError: the folder is in use, or the pipeline could not be run.
        KeyboardInterrupt: the running step was stopped.
    """
    from skd_kfp.pipelines.local.kfp_patch import run_locally

    with folder.locked():
        if folder.gather_records() and tracking_uri:
            from skd_lib.tracking.link import resend

            resend(str(folder.records), tracking_uri)
        if fresh:
            folder.forget()
        local = local_pipeline(documents, containers.images if containers else None)
        trials = comparison.trials if comparison else ()
        identity = run_identity(config, _images(local[0]), map(short, trials))
        settings = step_environment(
            folder.run_id(config, identity, fresh=fresh),
            tracking_uri=tracking_uri,
            experiment=experiment,
            checkpoint_root=str(folder.checkpoints),
        )
        settings[FOLDER_VARIABLE] = os.environ.get(FOLDER_VARIABLE) or str(folder.records)
        steps = {step.component: step for step in unrolled(read_steps(local[0]), [trial.label for trial in trials])}
        starting: contextlib.AbstractContextManager[Start] = (
            contextlib.nullcontext(containers.starter(settings))
            if containers
            else child_processes(settings, folder.logs / "forking.log")
        )
        form = comparison_parameters(comparison.compare, config) if comparison else to_parameters(config)
        arguments = {**form, "mlflow_experiment": experiment}
        kfp_log = folder.logs / "kfp.log"
        kfp_log.write_text("", encoding="utf-8")
        with starting as start, display:
            run = LocalRun(folder, steps, display, start)
            try:
                run_locally(
                    local,
                    arguments,
                    run,
                    artifacts=folder.artifacts,
                    cache_folder=folder.cache,
                    log=kfp_log,
                    containers=containers is not None,
                )
            except Exception as error:
                if run.failure:
                    raise run.failure from error
                if isinstance(error, OSError) or is_full_disk(error):
                    raise explained(error) from error
                with kfp_log.open("a", encoding="utf-8") as file:
                    file.write(redacted(traceback.format_exc()))
                raise SkdError(
                    f"kfp could not run the pipeline: {type(error).__name__}: {error}",
                    hint=f"kfp's own log is {kfp_log}",
                ) from error
            finally:
                _tell_of_records(folder, display)
        if run.failure:
            raise run.failure
        return run


def _tell_of_records(folder: RunFolder, display: Display) -> None:
    """Say which steps' records MLflow has not taken."""
    if files := folder.gather_records():
        steps: list[str] = []
        for file in files:
            with contextlib.suppress(SkdError):
                steps.append(read_place(Path(file)).step)
        named = ", ".join(sorted(set(steps))) or "a step"
        display.note(
            f"MLflow has not taken the records of {named}, which wait in {folder.records}. "
            "Once it answers, run the same command again, or "
            f"`skd track replay {shlex.quote(str(folder.records))}/*.jsonl`"
        )


def _read_outputs(task_folder: Path) -> dict[str, Any]:
    """Parameters and artifact URIs a step wrote in KFP's executor output."""
    file = task_folder / "executor_output.json"
    if not file.is_file():
        return {}
    output = json.loads(file.read_text(encoding="utf-8"))
    uris = {name: value["artifacts"][0]["uri"] for name, value in output.get("artifacts", {}).items()}
    return {**output.get("parameterValues", {}), **uris}
