"""What every step shares: its outputs in KFP's executor-output format, and how it fails.

A step is a plain command line. Under Kubeflow it also gets `--executor-input '{{$}}'`, KFP's description of the
task, from which come the artifacts' URIs and the metadata that earlier steps left on their artifacts.
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

from skd_lib import events
from skd_lib.bugs import explained
from skd_lib.storage import write_text_atomic
from skd_lib.terminal import VisibleFormatter, say, survive_any_encoding
from skd_lib.uris import redacted, redacted_output

log = logging.getLogger(__name__)
RESULT_ENV = "SKD_RESULT_URI"
"""Exchange folder in which another pod waits for this step's outputs (`skd_lib.multinode`)."""
LABEL_HELP = "Tells this run of the step in MLflow from others of the same pipeline run; empty where there is one."
FINGERPRINT_HELP = (
    "Fingerprint of the model as preflight found it: a hub model is fetched at that commit, any other must still be "
    "the same. Empty: whatever is there now."
)
EXECUTOR_INPUT_HELP = "KFP's executor input (JSON); set by the pipeline, leave it out by hand."


class Switch(StrEnum):
    """Yes or no as an option's value, which is how KFP passes one: `--option true`."""

    true = "true"
    false = "false"

    def __bool__(self) -> bool:
        return self is Switch.true


class StepIO:
    """The inputs' metadata and the outputs of one step.

    Args:
        executor_input: KFP's executor input as JSON; None when run by hand.
        outputs: Name and local path of each output artifact.
    """

    def __init__(self, executor_input: str | None, outputs: Mapping[str, Path]) -> None:
        self._task: dict[str, Any] = json.loads(executor_input) if executor_input else {}
        self.paths = dict(outputs)
        self._metadata: dict[str, dict[str, Any]] = {name: {} for name in outputs}
        self._parameters: dict[str, Any] = {}
        for path in self.paths.values():
            path.parent.mkdir(parents=True, exist_ok=True)

    def input_metadata(self, name: str) -> dict[str, Any]:
        """Metadata an earlier step left on input artifact `name`; empty when run by hand."""
        artifacts = self._task.get("inputs", {}).get("artifacts", {}).get(name, {}).get("artifacts", [])
        metadata = artifacts[0].get("metadata", {}) if artifacts else {}
        # KFP keeps metadata as protobuf, which has no whole numbers: 25 comes back as 25.0.
        return {key: int(x) if isinstance(x, float) and x.is_integer() else x for key, x in metadata.items()}

    def input_list(self, name: str) -> list[tuple[Path, dict[str, Any]]]:
        """Local path and metadata of each artifact of input list `name`, in order; empty when run by hand."""
        artifacts = self._task.get("inputs", {}).get("artifacts", {}).get(name, {}).get("artifacts", [])
        return [(local_path(artifact["uri"]), artifact.get("metadata", {})) for artifact in artifacts]

    def input_uri(self, name: str, path: Path) -> str:
        """URI of input artifact `name`; the local path when run by hand."""
        artifacts = self._task.get("inputs", {}).get("artifacts", {}).get(name, {}).get("artifacts", [])
        return str(artifacts[0]["uri"]) if artifacts else str(path.resolve())

    def output_uri(self, name: str) -> str:
        """URI under which output artifact `name` will be found after the step."""
        return str(self._output_artifact(name)["uri"])

    def metadata(self, name: str, **values: Any) -> None:
        """Add metadata to output artifact `name`."""
        self._metadata[name].update(values)

    def metrics(self, name: str, values: Mapping[str, float]) -> None:
        """Fill metrics artifact `name`. KFP shows numbers only."""
        self._metadata[name].update({key: float(value) for key, value in values.items()})

    def parameter(self, name: str, value: Any) -> None:
        """Set output parameter `name`."""
        self._parameters[name] = value

    def write(self) -> Path:
        """Write KFP's executor output: every output artifact with its URI and metadata, and the parameters.

        Environment:
            SKD_RESULT_URI: where another pod waits for the outputs, they are put there too. They are safe then, and
                checkpoints may go.

        Returns:
            The file: where KFP wants it, else `executor_output.json` beside the first output artifact.
        """
        artifacts = {}
        for name in self.paths:
            artifact = self._output_artifact(name)
            artifact["metadata"] = {**artifact.get("metadata", {}), **self._held(self._metadata[name], name)}
            artifacts[name] = {"artifacts": [artifact]}
        parameters = self._held(self._parameters, "")
        wanted = self._task.get("outputs", {}).get("outputFile")
        default = next(iter(self.paths.values())).parent if self.paths else Path.cwd()
        path = Path(wanted) if wanted else default / "executor_output.json"
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

    def _output_artifact(self, name: str) -> dict[str, Any]:
        artifacts = self._task.get("outputs", {}).get("artifacts", {}).get(name, {}).get("artifacts", [])
        return (
            dict(artifacts[0]) if artifacts else {"name": name, "uri": str(self.paths[name].resolve()), "metadata": {}}
        )


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
    started again (`Preempted`); 70 a bug of skd (`skd_lib.bugs`). KFP's launcher turns each but 0 into 1.
    """
    survive_any_encoding()
    with redacted_output(outlive_readers=True):
        handler = logging.StreamHandler()
        handler.setFormatter(VisibleFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        logging.basicConfig(level=os.environ.get("SKD_LOG_LEVEL", "INFO"), handlers=[handler])
        app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown")
        app.command()(main)
        try:
            app()
        except Exception as error:  # noqa: BLE001 - what nobody foresaw ends as a sentence too
            told = explained(error)
            events.emit("error", message=redacted(str(told)))
            say(f"error: {told}", err=True)
            sys.exit(told.exit_code)
