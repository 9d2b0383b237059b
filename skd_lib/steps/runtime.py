"""The parts that all steps share: options, outputs in KFP's executor-output format, and the end of a step that fails.

A step is a plain command line. Kubeflow also says where its outputs go, see `skd_lib.steps.kfp_call`. Where things are
kept changes no result, so on a cluster the options of this module come from the environment: as arguments they would be
part of Kubeflow's cache key, and another place would run everything again.
"""

from __future__ import annotations

import json
import logging
import math
import os
import sys
from collections.abc import Callable, Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from skd_lib._core import events
from skd_lib._core.bugs import explained
from skd_lib._core.terminal import VisibleFormatter, say, survive_any_encoding
from skd_lib._core.uris import redacted, redacted_output
from skd_lib.errors import SkdError
from skd_lib.steps import environment as env
from skd_lib.steps.kfp_call import called, current_call, take_call
from skd_lib.storage import write_text_atomic

log = logging.getLogger(__name__)
TrackingUri = Annotated[
    str, typer.Option(envvar=env.TRACKING_URI_VARIABLE, help="MLflow tracking URI; empty: no tracking.")
]
Experiment = Annotated[
    str, typer.Option(envvar=env.EXPERIMENT_VARIABLE, help="MLflow experiment for a pipeline run that is in none yet.")
]
CheckpointRoot = Annotated[
    str,
    typer.Option(
        envvar=env.CHECKPOINT_ROOT_VARIABLE, help="Folder or URI of storage that outlives the pod; empty: none."
    ),
]


class Switch(StrEnum):
    """Yes or no as an option's value, which is how KFP passes one: `--option true`."""

    true = "true"
    false = "false"

    def __bool__(self) -> bool:
        return self is Switch.true


class StepIO:
    """The outputs of one step, in the form KFP reads: local paths of output artifacts by name."""

    def __init__(self, outputs: Mapping[str, Path]) -> None:
        self._call = current_call()
        self.paths = dict(outputs)
        self._metrics: dict[str, dict[str, float]] = {}
        self._parameters: dict[str, Any] = {}
        for path in self.paths.values():
            path.parent.mkdir(parents=True, exist_ok=True)

    def input_paths(self, name: str) -> list[Path]:
        """Return the local path of each artifact of input list `name`, in order; empty when run by hand."""
        return [local_path(uri) for uri in self._call.lists.get(name, [])]

    def input_uri(self, name: str, path: Path) -> str:
        """Return the URI of input artifact `name`; the local path when run by hand."""
        return self._call.inputs.get(name) or self._call.uri(path)

    def output_uri(self, name: str) -> str:
        """Return the URI that output artifact `name` has after the step."""
        return self._call.artifacts.get(name) or self._call.uri(self.paths[name])

    def metrics(self, name: str, values: Mapping[str, float]) -> None:
        """Fill metrics artifact `name`. KFP shows numbers only, which it keeps as the artifact's metadata."""
        self._metrics[name] = {key: float(value) for key, value in values.items()}

    def parameter(self, name: str, value: Any) -> None:
        """Set output parameter `name`."""
        self._parameters[name] = value

    def write(self) -> Path | None:
        """Write KFP's executor output: every output artifact with its URI, metrics with their values, the parameters.

        Each parameter also goes to the file that KFP names for it, which a task without artifacts depends on. If
        another pod waits for the outputs (`SKD_RESULT_URI`), they are put there too: they are safe then, and
        checkpoints may go. Returns the executor output; None for a task without one, see `Call.executor_output`.
        """
        artifacts = {name: {"artifacts": [self._artifact(name)]} for name in self.paths}
        parameters = _without_gaps(self._parameters)
        for name, value in parameters.items():
            if file := self._call.parameters.get(name):
                file.parent.mkdir(parents=True, exist_ok=True)
                write_text_atomic(file, value if isinstance(value, str) else json.dumps(value))
        path = self._call.executor_output(self.paths)
        if path is None:
            return None
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomic(path, json.dumps({"artifacts": artifacts, "parameterValues": parameters}, indent=2))
        if result := os.environ.get(env.RESULT_VARIABLE):
            from skd_lib.multinode.exchange import Exchange

            Exchange(result).publish(self.paths, path)
        return path

    def _artifact(self, name: str) -> dict[str, Any]:
        values = _without_gaps(self._metrics.get(name, {}), of=name)
        artifact: dict[str, Any] = {"name": name, "uri": self.output_uri(name), "metadata": values}
        if name in self._metrics:
            # By which the launcher without MLMD tells metrics from other artifacts.
            artifact["type"] = {"schemaTitle": "system.Metrics", "schemaVersion": "0.0.1"}
        return artifact


def _without_gaps(values: Mapping[str, Any], *, of: str = "") -> dict[str, Any]:
    """Leave out what KFP cannot hold, with a warning.

    KFP 2.17's launcher fails, and the step with it, on NaN and infinity anywhere and on null in metadata; a null
    parameter ends the run in the driver of the step that reads it.
    """
    left_out: list[str] = []
    finite: dict[str, Any] = _finite(values, "", left_out)
    if left_out:
        log.warning("left out of KFP's record%s: %s", f" of {of}" if of else "", ", ".join(left_out))
    return {name: value for name, value in finite.items() if value is not None}


def _finite(value: Any, place: str, left_out: list[str]) -> Any:
    """Return a value without the numbers that are not finite; in a list None takes their places."""
    if isinstance(value, float) and not math.isfinite(value):
        left_out.append(f"{place} ({value})")
        return None
    within = f"{place}." if place else ""
    if isinstance(value, Mapping):
        finite = {name: _finite(each, f"{within}{name}", left_out) for name, each in value.items()}
        return {name: each for name, each in finite.items() if each is not None or value[name] is None}
    if isinstance(value, list | tuple):
        return [_finite(each, f"{within}{index}", left_out) for index, each in enumerate(value)]
    return value


def local_path(uri: str) -> Path:
    """Return the path to which KFP's launcher fetches an input: `gs://bucket/key` to `/gcs/bucket/key`."""
    scheme, separator, rest = uri.partition("://")
    return Path("/", {"gs": "gcs"}.get(scheme, scheme), rest) if separator else Path(uri)


def present(name: str, path: Path) -> Path:
    """Return the path of input artifact `name`, or raise SkdError if nothing is there, or nothing in it.

    KFP takes a finished step from its cache without a look at the step's outputs, and its launcher says nothing where
    there is nothing to fetch: the next step finds no file, or an empty folder.
    """
    if not (any(files for _, _, files in os.walk(path)) or (path.is_file() and path.stat().st_size)):
        raise SkdError(
            f"the input `{name}` is gone from storage: nothing is there",
            where=str(path),
            hint="if a lifecycle rule of the bucket deletes old files, run again without the cache, which makes it "
            "again: `reuse` false in the form, or `skd submit --no-reuse` (in later runs too, if the namespace has no "
            "`checkpoint-root`); by hand, check the path",
        )
    return path


def step_name(step: str, label: str) -> str:
    """Return the name of a step's MLflow run."""
    return f"{step}-{label}" if label else step


def run_step(main: Callable[..., None]) -> None:
    """Run a step's typer function: set up logging, and fail with the user's sentence rather than a stack of frames.

    Exit codes: 0 done; 2 the user must correct something (`SkdError`); 75 to be started again: stopped by SIGTERM with
    all work saved (`Preempted`), or failed for what may pass by itself (`Transient`); 70 a bug of skd
    (`skd_lib._core.bugs`). KFP's launcher turns each but 0 into 1.
    """
    survive_any_encoding()
    env.load_mounted()
    with redacted_output(outlive_readers=True):
        handler = logging.StreamHandler()
        handler.setFormatter(VisibleFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        logging.basicConfig(level=os.environ.get("SKD_LOG_LEVEL", "INFO"), handlers=[handler])
        # peft imports bitsandbytes where it is installed, which then warns of kernels that no step has asked for.
        logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
        app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown")
        app.command()(main)
        words, call = take_call(sys.argv[1:])
        try:
            with called(call):
                app(words)
        except Exception as error:  # noqa: BLE001 - unexpected errors end as a sentence too
            reason = explained(error)
            events.emit("error", message=redacted(str(reason)))
            say(f"error: {reason}", err=True)
            sys.exit(reason.exit_code)
