"""What KFP tells a step on its command line, in front of which the step's own options stand.

Kubeflow's launcher fills in single placeholders: of each output artifact its URI, of each output parameter the file it
is read from, of each input artifact its URI. The whole executor input (`{{$}}`) is larger than an argument may be, and
only the way to lists of artifacts. `{{$.outputs.output_file}}`, the file for KFP's executor output, is filled in by
`kfp.local`, but not by the launcher (KFP 2.14 to 2.17): see `Call.executor_output`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path

OUTPUT_FILE_OPTION = "--kfp-output-file"
"""File for KFP's executor output."""
ARTIFACT_OPTION = "--kfp-artifact"
"""`NAME=URI` of an output artifact."""
PARAMETERS_OPTION = "--kfp-parameters"
"""`NAME,NAME,...=FILE`: the output parameters, and the file of the first; the others are beside it, by their names."""
INPUT_OPTION = "--kfp-input"
"""`NAME=URI` of an input artifact."""
EXECUTOR_INPUT_OPTION = "--kfp-executor-input"
"""KFP's executor input as JSON, for steps with lists of artifacts."""
_OPTIONS = (OUTPUT_FILE_OPTION, ARTIFACT_OPTION, PARAMETERS_OPTION, INPUT_OPTION, EXECUTOR_INPUT_OPTION)
_BY_HAND, _IN_A_POD = "executor_output.json", "output_metadata.json"


@dataclass(frozen=True)
class Call:
    """How KFP has called this process; empty by hand.

    Attributes:
        launched: Whether KFP has.
        output_file: Where the executor output goes; None where that is not told.
        artifacts: URIs of the output artifacts, by name.
        parameters: Files of the output parameters, by name.
        inputs: URIs of input artifacts, by name.
        lists: URIs of lists of input artifacts, by name.
    """

    launched: bool = False
    output_file: Path | None = None
    artifacts: Mapping[str, str] = field(default_factory=dict)
    parameters: Mapping[str, Path] = field(default_factory=dict)
    inputs: Mapping[str, str] = field(default_factory=dict)
    lists: Mapping[str, list[str]] = field(default_factory=dict)

    @property
    def in_pod(self) -> bool:
        """Whether Kubeflow's launcher has called: it leaves the file for the executor output unsaid."""
        return self.launched and self.output_file is None

    def executor_output(self, outputs: Mapping[str, Path]) -> Path | None:
        """Choose the file for the executor output.

        Where the launcher does not tell it, it reads `output_metadata.json` in the folder of the task's artifacts
        (`provisionOutputs` of KFP's driver since 2.15). A task without artifacts has none: its parameters' files do.

        Args:
            outputs: Local paths of the output artifacts.
        """
        if self.output_file is not None:
            return self.output_file
        folder = next(iter(outputs.values())).parent if outputs else None
        if self.launched:
            return folder / _IN_A_POD if folder else None
        return (folder or Path.cwd()) / _BY_HAND

    def words(self) -> list[str]:
        """The options that tell another process the same, but for the lists."""
        pairs = [(OUTPUT_FILE_OPTION, str(self.output_file))] if self.output_file else []
        for option, values in ((ARTIFACT_OPTION, self.artifacts), (INPUT_OPTION, self.inputs)):
            pairs += [(option, f"{name}={value}") for name, value in values.items()]
        if self.parameters:
            pairs.append((PARAMETERS_OPTION, f"{','.join(self.parameters)}={next(iter(self.parameters.values()))}"))
        return [word for pair in pairs for word in pair]


_current: ContextVar[Call | None] = ContextVar("call", default=None)


def current_call() -> Call:
    """How KFP has called this process."""
    return _current.get() or Call()


@contextmanager
def called(call: Call) -> Iterator[None]:
    """Let `call` be the current one."""
    token = _current.set(call)
    try:
        yield
    finally:
        _current.reset(token)


def take_call(words: Sequence[str]) -> tuple[list[str], Call]:
    """Part a command line into the step's own words and what KFP tells it.

    Args:
        words: Without the program's name.
    """
    own: list[str] = []
    told: dict[str, list[str]] = {option: [] for option in _OPTIONS}
    left = iter(words)
    for word in left:
        if word in told:
            told[word].append(next(left, ""))
        else:
            own.append(word)
    file = next((Path(value) for value in told[OUTPUT_FILE_OPTION] if not value.startswith("{{")), None)
    task = json.loads(next(iter(told[EXECUTOR_INPUT_OPTION]), "{}"))
    lists = {
        name: [str(artifact["uri"]) for artifact in entry.get("artifacts", [])]
        for name, entry in task.get("inputs", {}).get("artifacts", {}).items()
    }
    parameters = {
        name: Path(file).parent / name
        for names, file in _pairs(told[PARAMETERS_OPTION]).items()
        for name in names.split(",")
    }
    call = Call(any(told.values()), file, _pairs(told[ARTIFACT_OPTION]), parameters, _pairs(told[INPUT_OPTION]), lists)
    return own, call


def _pairs(texts: Sequence[str]) -> dict[str, str]:
    return {name: value for name, _, value in (text.partition("=") for text in texts)}
