"""The record of a training in its model's folder, so that it goes wherever the model goes.

    MODEL/skd_record/lineage.json   where the model came from, what its data lost, and the run that trained it
    MODEL/skd_record/course.json    curves of the training, rounded, and where its time and memory went
    MODEL/skd_record/figures.json   closing figures of the training
    MODEL/skd_record/samples.jsonl  a few sequences that the student was trained on, token by token, one a line:

    {"step": 25, "row": 0, "prompt": "...", "tokens": [
      {"text": "The", "by": "student"},
      {"text": " cat", "by": "teacher", "proposal":
        {"text": " dog", "rank": 31, "probability": 0.0004, "own_rank": 0, "own_probability": 0.93}}]}

Ranks count from 0. Texts are what the models wrote, so nothing that shows them may trust them.

Step `evaluate` copies the record into the model's evaluation, so that later steps need not fetch the model.
"""

from __future__ import annotations

import json
import platform
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from skd_lib._core.documents import read_text
from skd_lib.config import parse_json, parse_section
from skd_lib.errors import SkdError
from skd_lib.results import Course, Figures, rounded
from skd_lib.storage import write_text_atomic

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from skd_lib.training.traces import Trace

RECORD = "skd_record"
_PACKAGES = ("skd-lib", "torch", "transformers")
_UNFINISHED = "\ufffd"
_LONGEST_CHARACTER = 4  # bytes, and so tokens
_CONTEXT = 4
"""Tokens of the prompt that the first response tokens are decoded behind: some tokenizers drop a text's first space."""


class Proposal(Figures):
    """The draft that the teacher replaced, as `skd_lib.training.traces.Replacement`."""

    text: str
    rank: int = Field(ge=0)
    probability: float = Field(ge=0, le=1)
    own_rank: int = Field(ge=0)
    own_probability: float = Field(ge=0, le=1)


_PROPOSAL = Proposal.model_fields.keys() - {"text"}


class SampledToken(Figures):
    """One response token; its text is empty where it only begins a character that a later token ends."""

    text: str
    by: Literal["student", "teacher"]
    proposal: Proposal | None = None


class SampledSequence(Figures):
    """One response that was trained on."""

    step: int = Field(ge=0, description="Optimiser step, from 1.")
    row: int = Field(ge=0)
    prompt: str
    tokens: tuple[SampledToken, ...]


LINEAGE, COURSE, FIGURES, SAMPLES = "lineage.json", "course.json", "figures.json", "samples.jsonl"


@dataclass(frozen=True)
class Record:
    """A model's record, as in the files above; what was not recorded is empty.

    Its lineage has `losses`, what each split of the data lost, `pipeline_run_id`, Kubeflow's run that trained it, and
    `mlflow_run_id`, the MLflow run of that.
    """

    folder: Path
    lineage: Mapping[str, Any]
    course: Course
    figures: Mapping[str, float]

    @property
    def mlflow_run_id(self) -> str:
        """MLflow run of the pipeline run that trained the model; empty where that was not tracked."""
        return str(self.lineage.get("mlflow_run_id") or "")

    def samples(self) -> list[SampledSequence]:
        """Read the recorded sequences."""
        file = self.folder / SAMPLES
        return read_samples(file) if file.is_file() else []


def write_record(
    model: Path,
    *,
    lineage: Mapping[str, Any],
    course: Mapping[str, Any] | None = None,
    figures: Mapping[str, float] | None = None,
    samples: str = "",
) -> None:
    """Write a model's record into its folder."""
    folder = model / RECORD
    folder.mkdir(parents=True, exist_ok=True)
    for name, values in {LINEAGE: lineage, COURSE: _rounded(course or {}), FIGURES: figures or {}}.items():
        write_text_atomic(folder / name, json.dumps(values, indent=None if name == COURSE else 2) + "\n")
    write_text_atomic(folder / SAMPLES, samples)


def read_record(folder: Path) -> Record:
    """Read the record in the folder of a model, or of its evaluation; an empty one where there is none."""
    record = folder / RECORD
    course = record / COURSE
    return Record(
        folder=record,
        lineage=_values(record / LINEAGE),
        course=parse_section(Course, _values(course), where=str(course)),
        figures=_values(record / FIGURES),
    )


def copy_record(model: Path, folder: Path) -> None:
    """Copy a model's record into another folder; nothing where there is none."""
    if (model / RECORD).is_dir():
        shutil.copytree(model / RECORD, folder / RECORD, dirs_exist_ok=True)


def as_text(trace: Trace, tokenizer: PreTrainedTokenizerBase) -> SampledSequence:
    """Decode a trace."""
    proposals = {replacement.position: replacement.proposal for replacement in trace.replacements}
    texts, proposal_texts = _token_texts(tokenizer, trace.prompt_ids[-_CONTEXT:], trace.token_ids, proposals)
    details = {
        each.position: Proposal(text=proposal_texts[each.position], **{name: getattr(each, name) for name in _PROPOSAL})
        for each in trace.replacements
    }
    return SampledSequence(
        step=trace.step,
        row=trace.row,
        prompt=_decode(tokenizer, trace.prompt_ids),
        tokens=tuple(
            SampledToken(text=text, by="teacher" if writer else "student", proposal=details.get(position))
            for position, (text, writer) in enumerate(zip(texts, trace.writers, strict=True))
        ),
    )


def to_jsonl(sequences: Iterable[SampledSequence]) -> str:
    """Return the file's content; ASCII, so that broken text from a model does not break the file."""
    return "".join(json.dumps(sequence.model_dump(mode="json", exclude_none=True)) + "\n" for sequence in sequences)


def read_samples(path: Path) -> list[SampledSequence]:
    """Read what `to_jsonl` made."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise SkdError(f"cannot read the training sequences: {error}", where=str(path)) from error
    return [
        parse_section(SampledSequence, line, where=f"{path}, line {number}")
        for number, line in enumerate(lines, 1)
        if line
    ]


def software() -> str:
    """Return the versions of Python and the packages that this process runs on."""
    found = [f"Python {platform.python_version()}"]
    for package in _PACKAGES:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:  # run from a source tree, or without the extra
            continue
    return ", ".join(found)


def _values(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    values: dict[str, Any] = parse_json(read_text(file), where=str(file), plain=False)
    return values


def _rounded(values: Any) -> Any:
    """Round numbers to five significant digits, which is enough for a curve; whole numbers stay as they are."""
    if isinstance(values, float):
        return rounded(values)
    if isinstance(values, Mapping):
        return {name: _rounded(value) for name, value in values.items()}
    if isinstance(values, list | tuple):
        return [_rounded(value) for value in values]
    return values


def _token_texts(
    tokenizer: PreTrainedTokenizerBase, context: Sequence[int], ids: Sequence[int], proposals: dict[int, int]
) -> tuple[list[str], dict[int, str]]:
    """Return the text that each token adds, and the text that each proposal would have added.

    Each is decoded behind the tokens that added the last piece of text, not behind all of them: the time is linear.
    """
    known = [*context, *ids]
    start, end = 0, len(context)
    texts, proposed = [], {}
    for position in range(len(ids)):
        before = _decode(tokenizer, known[start:end])
        if position in proposals:
            proposal = proposals[position]
            with_proposal = _decode(tokenizer, [*known[start : len(context) + position], proposal])
            proposed[position] = with_proposal[len(before) :] or f"[token {proposal}]"
        text = _decode(tokenizer, known[start : len(context) + position + 1])
        pending = len(context) + position + 1 - end
        if text.endswith(_UNFINISHED) and pending < _LONGEST_CHARACTER and position + 1 < len(ids):
            texts.append("")
            continue
        texts.append(text[len(before) :])
        start, end = end, len(context) + position + 1
    return texts, proposed


def _decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))
