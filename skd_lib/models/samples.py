"""Training sequences as text, token by token: JSONL, one sequence a line.

    {"step": 25, "row": 0, "prompt": "...", "tokens": [
      {"text": "The", "by": "student"},
      {"text": " cat", "by": "teacher", "proposal":
        {"text": " dog", "rank": 31, "probability": 0.0004, "own_rank": 0, "own_probability": 0.93}}]}

Ranks count from 0. Text is what the models wrote, so nothing that shows it may trust it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import ConfigDict, Field

from skd_lib.config import Section, parse_section
from skd_lib.errors import SkdError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from skd_lib.training.traces import Trace

_UNFINISHED = "\ufffd"
_LONGEST_CHARACTER = 4  # bytes, and so tokens
_CONTEXT = 4
"""Tokens of the prompt that the first response tokens are decoded behind: some tokenizers drop a text's first space."""


class Proposal(Section):
    """The draft that the teacher replaced, as `skd_lib.training.traces.Replacement`."""

    model_config = ConfigDict(extra="ignore")

    text: str
    rank: int = Field(ge=0)
    probability: float = Field(ge=0, le=1)
    own_rank: int = Field(ge=0)
    own_probability: float = Field(ge=0, le=1)


_PROPOSAL = Proposal.model_fields.keys() - {"text"}


class SampledToken(Section):
    """One response token; its text is empty where it only begins a character that a later token ends."""

    model_config = ConfigDict(extra="ignore")

    text: str
    by: Literal["student", "teacher"]
    proposal: Proposal | None = None


class SampledSequence(Section):
    """One response that was trained on."""

    model_config = ConfigDict(extra="ignore")

    step: int = Field(ge=0, description="Optimiser step, from 1.")
    row: int = Field(ge=0)
    prompt: str
    tokens: tuple[SampledToken, ...]


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
    """Read what `to_jsonl` made.

    Raises:
        SkdError: the file cannot be read, or a line is no sequence.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise SkdError(f"cannot read the training sequences: {error}", where=str(path)) from error
    return [
        parse_section(SampledSequence, line, where=f"{path}, line {number}")
        for number, line in enumerate(lines, 1)
        if line
    ]


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
