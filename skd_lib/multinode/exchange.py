"""Inputs and results that the waiting step and its nodes exchange, in object storage under `checkpoint_root`.

A step's inputs are files that Kubeflow's launcher fetched into its own pod, and its outputs are files there that the
launcher will upload: neither is in reach of another pod. So the nodes fetch the inputs from where the launcher did, and
put the outputs into a folder from which the step fetches them.

    CHECKPOINT_ROOT/multinode/JOB/request.json   the step and its options
    CHECKPOINT_ROOT/multinode/JOB/made/          inputs that the step has made for them, by option
    CHECKPOINT_ROOT/multinode/JOB/result/        the outputs by name, KFP's executor output, and last the marker
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from skd_lib import storage
from skd_lib.errors import SkdError

EXECUTOR_OUTPUT = "executor_output.json"
_REQUEST, _MADE, _RESULT, _MARKER = "request.json", "made", "result", "complete"


class Request(BaseModel):
    """The work of the nodes: a module of `skd_lib.steps`, and its options but for inputs and outputs.

    `inputs` has URIs by option, `outputs` names by option, and `artifacts` the URIs of the outputs by name.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    step: str
    options: dict[str, str]
    inputs: dict[str, str]
    outputs: dict[str, str]
    artifacts: dict[str, str]


@dataclass(frozen=True)
class Exchange:
    """The folder of one job, at `uri`."""

    uri: str

    def write(self, request: Request) -> None:
        """Write the request for the nodes."""
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / _REQUEST
            file.write_text(request.model_dump_json(), encoding="utf-8")
            storage.upload(file, f"{self.uri}/{_REQUEST}")

    def give(self, made: Mapping[str, Path]) -> dict[str, str]:
        """Upload files and folders for the nodes, and return their URIs."""
        uris = {name: f"{self.uri}/{_MADE}/{name}" for name in made}
        for name, path in made.items():
            storage.upload(path, uris[name])
        return uris

    def request(self) -> Request:
        """Return the request."""
        return Request.model_validate_json(storage.read_bytes(f"{self.uri}/{_REQUEST}"))

    def is_complete(self) -> bool:
        """Return whether the whole result is there."""
        return storage.exists(f"{self.uri}/{_RESULT}/{_MARKER}")

    def publish(self, outputs: Mapping[str, Path], executor_output: Path) -> None:
        """Upload a result: output files and folders by name, KFP's executor output, and last the marker."""
        for name, path in {**outputs, EXECUTOR_OUTPUT: executor_output}.items():
            storage.upload(path, f"{self.uri}/{_RESULT}/{name}")
        with tempfile.TemporaryDirectory() as folder:
            marker = Path(folder) / _MARKER
            marker.touch()
            storage.upload(marker, f"{self.uri}/{_RESULT}/{_MARKER}")

    def fetch(self, outputs: Mapping[str, Path], executor_output: Path) -> None:
        """Download a result to the step's own paths; see `publish`."""
        for name, path in {**outputs, EXECUTOR_OUTPUT: executor_output}.items():
            storage.download(f"{self.uri}/{_RESULT}/{name}", path)

    def remove(self) -> None:
        """Delete all of it."""
        storage.delete(self.uri)


def check_reachable(uris: Mapping[str, str]) -> None:
    """Raise SkdError unless other pods can reach these URIs, given by their contents' names."""
    for what, uri in uris.items():
        if not storage.is_remote(uri):
            raise SkdError(
                f"{what} is at {uri or '(nowhere)'}, where the nodes of a TrainJob cannot get at it",
                where="multinode",
                hint="give the run a pipeline root in gs:// (`skd submit --pipeline-root`) and the namespace a "
                "`checkpoint-root` there (ConfigMap `skd-settings`), or other object storage that is read here",
            )
