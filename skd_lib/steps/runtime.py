"""What every step shares: its outputs in KFP's executor-output format, and how it fails.

A step is a plain command line. Under Kubeflow it is also told where its outputs go, see `skd_lib.steps.kfp_call`.
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
from typing import Any

import typer

from skd_lib._core import events
from skd_lib._core.bugs import explained
from skd_lib._core.terminal import VisibleFormatter, say, survive_any_encoding
from skd_lib._core.uris import redacted, redacted_output
from skd_lib.steps.kfp_call import called, current_call, take_call
from skd_lib.steps.mounted import load_mounted
from skd_lib.storage import write_text_atomic

log = logging.getLogger(__name__)
RESULT_ENV = "SKD_RESULT_URI"
"""Exchange folder in which another pod waits for this step's outputs (`skd_lib.multinode`)."""


class Switch(StrEnum):
    """Yes or no as an option's value, which is how KFP passes one: `--option true`."""

    true = "true"
    false = "false"

    def __bool__(self) -> bool:
        return self is Switch.true


class StepIO:
    """The outputs of one step, in the form KFP reads.

    Args:
        outputs: Name and local path of each output artifact.
    """

    def __init__(self, outputs: Mapping[str, Path]) -> None:
        self._call = current_call()
        self.paths = dict(outputs)
        self._metrics: dict[str, dict[str, float]] = {}
        self._parameters: dict[str, Any] = {}
        for path in self.paths.values():
            path.parent.mkdir(parents=True, exist_ok=True)

    def input_paths(self, name: str) -> list[Path]:
        """Local path of each artifact of input list `name`, in order; empty when run by hand."""
        return [local_path(uri) for uri in self._call.lists.get(name, [])]

    def input_uri(self, name: str, path: Path) -> str:
        """URI of input artifact `name`; the local path when run by hand."""
        return self._call.inputs.get(name) or self._call.uri(path)

    def output_uri(self, name: str) -> str:
        """URI under which output artifact `name` will be found after the step."""
        return self._call.artifacts.get(name) or self._call.uri(self.paths[name])

    def metrics(self, name: str, values: Mapping[str, float]) -> None:
        """Fill metrics artifact `name`. KFP shows numbers only, which it keeps as the artifact's metadata."""
        self._metrics[name] = {key: float(value) for key, value in values.items()}

    def parameter(self, name: str, value: Any) -> None:
        """Set output parameter `name`."""
        self._parameters[name] = value

    def write(self) -> Path | None:
        """Write KFP's executor output: every output artifact with its URI, metrics with their values, the parameters.

        Each parameter also goes to the file that KFP names for it, which a task without artifacts depends on.

        Environment:
            SKD_RESULT_URI: where another pod waits for the outputs, they are put there too. They are safe then, and
                checkpoints may go.

        Returns:
            The executor output; None where the task has none, see `Call.executor_output`.
        """
        artifacts = {name: {"artifacts": [self._artifact(name)]} for name in self.paths}
        parameters = self._held(self._parameters, "")
        for name, value in parameters.items():
            if file := self._call.parameters.get(name):
                file.parent.mkdir(parents=True, exist_ok=True)
                write_text_atomic(file, value if isinstance(value, str) else json.dumps(value))
        path = self._call.executor_output(self.paths)
        if path is None:
            return None
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomic(path, json.dumps({"artifacts": artifacts, "parameterValues": parameters}, indent=2))
        if result := os.environ.get(RESULT_ENV):
            from skd_lib.multinode.exchange import Exchange

            Exchange(result).publish(self.paths, path)
        return path

    @staticmethod
    def _held(values: Mapping[str, Any], artifact: str) -> dict[str, Any]:
        """Leave out what KFP cannot hold, with a warning.

        KFP 2.17's launcher fails, and the step with it, on NaN and infinity anywhere and on null in metadata; a null
        parameter ends the run in the driver of the step that reads it.
        """
        held, left_out = _finite(values)
        if left_out:
            log.warning("left out of KFP's record%s: %s", f" of {artifact}" if artifact else "", ", ".join(left_out))
        return {name: value for name, value in held.items() if value is not None}

    def _artifact(self, name: str) -> dict[str, Any]:
        values = self._held(self._metrics.get(name, {}), name)
        artifact: dict[str, Any] = {"name": name, "uri": self.output_uri(name), "metadata": values}
        if name in self._metrics:
            # By which the launcher without MLMD tells metrics from other artifacts.
            artifact["type"] = {"schemaTitle": "system.Metrics", "schemaVersion": "0.0.1"}
        return artifact


def _finite(values: Mapping[str, Any], prefix: str = "") -> tuple[dict[str, Any], list[str]]:
    """Values without numbers that are not finite, and where those stood; in a list None takes their places."""
    held: dict[str, Any] = {}
    left_out: list[str] = []
    for name, value in values.items():
        place = f"{prefix}{name}"
        if isinstance(value, float) and not math.isfinite(value):
            left_out.append(f"{place} ({value})")
        elif isinstance(value, Mapping):
            held[name], more = _finite(value, f"{place}.")
            left_out += more
        elif isinstance(value, list | tuple):
            items, more = _finite({str(index): item for index, item in enumerate(value)}, f"{place}.")
            held[name] = [items.get(str(index)) for index in range(len(value))]
            left_out += more
        else:
            held[name] = value
    return held, left_out


def local_path(uri: str) -> Path:
    """Where KFP's launcher puts an input artifact: `gs://bucket/key` at `/gcs/bucket/key`; a path is itself."""
    scheme, separator, rest = uri.partition("://")
    return Path("/", {"gs": "gcs"}.get(scheme, scheme), rest) if separator else Path(uri)


def step_name(step: str, label: str) -> str:
    """Name of a step's MLflow run."""
    return f"{step}-{label}" if label else step


def run_step(main: Callable[..., None]) -> None:
    """Run a step's typer function: set up logging, and fail with the user's sentence rather than a stack of frames.

    Exit codes: 0 done; 2 the user must correct something (`SkdError`); 75 stopped by SIGTERM with all work saved, to be
    started again (`Preempted`); 70 a bug of skd (`skd_lib._core.bugs`). KFP's launcher turns each but 0 into 1.
    """
    survive_any_encoding()
    load_mounted()
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
        except Exception as error:  # noqa: BLE001 - what nobody foresaw ends as a sentence too
            told = explained(error)
            events.emit("error", message=redacted(str(told)))
            say(f"error: {told}", err=True)
            sys.exit(told.exit_code)
