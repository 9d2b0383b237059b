"""The words of KFP on a step's command line, behind the step's own options.

Each word of a command is kept many times in Kubeflow's records of a run (`pipelines/kubeflow/node_statuses.py`), so
there are few: the files of the output parameters, and for steps with lists of artifacts KFP's whole executor input
(`{{$}}`), which is the only way to them. The URI of an artifact follows from its local path, and KFP's executor output
lies in the folder of the task's artifacts. Runners on this machine, and the nodes of a TrainJob, give more.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path

from skd_lib._core.machine import POD_VARIABLE

OUTPUT_FILE_OPTION = "--kfp-output-file"
OUTPUT_FILE = "{{$.outputs.output_file}}"
"""File for KFP's executor output, which runners on this machine fill in; KFP's launcher does not (2.14 to 2.17)."""
ARTIFACT_OPTION = "--kfp-artifact"
"""`NAME=URI` of an output artifact, where its path does not tell."""
PARAMETERS_OPTION = "--kfp-parameters"
"""`NAME,NAME,...=FILE`: the output parameters, and the file of the first; the others are in its folder."""
INPUT_OPTION = "--kfp-input"
"""`NAME=URI` of an input artifact, where its path does not tell."""
EXECUTOR_INPUT_OPTION = "--kfp-executor-input"
"""KFP's executor input as JSON, for steps with lists of artifacts."""
_OPTIONS = (OUTPUT_FILE_OPTION, ARTIFACT_OPTION, PARAMETERS_OPTION, INPUT_OPTION, EXECUTOR_INPUT_OPTION)
_BY_HAND, _IN_A_POD = "executor_output.json", "output_metadata.json"
SCHEMES = {"gcs": "gs", "minio": "minio", "s3": "s3"}
"""Folder in which KFP mounts a bucket -> scheme of its URIs."""


@dataclass(frozen=True)
class Call:
    """KFP's words to this process: file of the executor output, and files of the output parameters by name.

    URIs of output artifacts and inputs are given where their paths do not tell, and those of lists of inputs by name.
    """

    output_file: Path | None = None
    artifacts: Mapping[str, str] = field(default_factory=dict)
    parameters: Mapping[str, Path] = field(default_factory=dict)
    inputs: Mapping[str, str] = field(default_factory=dict)
    lists: Mapping[str, list[str]] = field(default_factory=dict)

    @property
    def in_pod(self) -> bool:
        """The caller is Kubeflow's launcher."""
        return self.output_file is None and POD_VARIABLE in os.environ

    def uri(self, path: Path) -> str:
        """Return the URI of an artifact by its local path (`LocalPathForURI` of KFP's launcher); by hand the path."""
        place = path.resolve()
        if self.in_pod and len(place.parts) > 1 and place.parts[1] in SCHEMES:
            return f"{SCHEMES[place.parts[1]]}://{'/'.join(place.parts[2:])}"
        return str(place)

    def executor_output(self, outputs: Mapping[str, Path]) -> Path | None:
        """Return the file for the executor output of a task with these output artifacts.

        If none is given, KFP's launcher reads `output_metadata.json` in the folder of the task's artifacts
        (`provisionOutputs` of its driver since 2.15). A task without artifacts has none: its parameters' files do.
        """
        if self.output_file is not None:
            return self.output_file
        folder = next(iter(outputs.values())).parent if outputs else None
        if self.in_pod:
            return folder / _IN_A_POD if folder else None
        return (folder or Path.cwd()) / _BY_HAND

    def words(self) -> list[str]:
        """Return the options for another process with the same call, but for the lists."""
        pairs = [(OUTPUT_FILE_OPTION, str(self.output_file))] if self.output_file else []
        for option, values in ((ARTIFACT_OPTION, self.artifacts), (INPUT_OPTION, self.inputs)):
            pairs += [(option, f"{name}={value}") for name, value in values.items()]
        if self.parameters:
            pairs.append((PARAMETERS_OPTION, f"{','.join(self.parameters)}={next(iter(self.parameters.values()))}"))
        return [word for pair in pairs for word in pair]


_current: ContextVar[Call | None] = ContextVar("call", default=None)


def current_call() -> Call:
    """Return KFP's words to this process."""
    return _current.get() or Call()


@contextmanager
def called(call: Call) -> Iterator[None]:
    """Make `call` the current one in the body."""
    token = _current.set(call)
    try:
        yield
    finally:
        _current.reset(token)


def take_call(words: Sequence[str]) -> tuple[list[str], Call]:
    """Split a command line, without the program's name, into the step's own words and KFP's."""
    own: list[str] = []
    said: dict[str, list[str]] = {option: [] for option in _OPTIONS}
    left = iter(words)
    for word in left:
        if word in said:
            said[word].append(next(left, ""))
        else:
            own.append(word)
    file = next(map(Path, said[OUTPUT_FILE_OPTION]), None)
    task = json.loads(next(iter(said[EXECUTOR_INPUT_OPTION]), "{}"))
    lists = {
        name: [str(artifact["uri"]) for artifact in entry.get("artifacts", [])]
        for name, entry in task.get("inputs", {}).get("artifacts", {}).items()
    }
    parameters = {
        name: Path(file).parent / name
        for names, file in _pairs(said[PARAMETERS_OPTION]).items()
        for name in names.split(",")
    }
    call = Call(file, _pairs(said[ARTIFACT_OPTION]), parameters, _pairs(said[INPUT_OPTION]), lists)
    return own, call


def _pairs(texts: Sequence[str]) -> dict[str, str]:
    return {name: value for name, _, value in (text.partition("=") for text in texts)}
