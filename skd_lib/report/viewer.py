"""The sample viewer: training sequences token by token, step by step, so that one sees the student take over."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

from markupsafe import Markup

from skd_lib._core.format import percent
from skd_lib._core.terminal import clipped, visible
from skd_lib.models.records import SampledSequence, SampledToken
from skd_lib.report.charts import bars
from skd_lib.report.series import spread

TOKENS_SHOWN = 240
"""Of each sequence: the page stays below a megabyte."""
STEPS_SHOWN = 24
_PROMPT_SHOWN = 600
_TOKEN_SHOWN = 120

_STUDENT = Markup('<span class="t">{}</span>')
_TEACHER = Markup('<span class="t by-teacher">{}</span>')
_REPLACED = Markup('<span class="t by-teacher" tabindex="0">{}<span class="tip" role="note">{}</span></span>')
_TIP = Markup(
    '<span class="side student">student proposed</span> <s>{}</s>'
    ' <span class="fine">rank {} with the teacher, probability {}</span><br>'
    '<span class="side teacher">teacher wrote</span> <b>{}</b> <span class="fine">rank {}, probability {}</span>'
)


class SequenceView(NamedTuple):
    """One sequence: prompt and response as shown, and the numbers of tokens, of hidden ones and of the teacher's."""

    row: int
    prompt: str
    response: Markup
    tokens: int
    left_out: int
    by_teacher: int


class StepView(NamedTuple):
    """The sequences of one optimiser step, and the share of their tokens that the teacher wrote."""

    step: int
    teacher_share: float
    sequences: list[SequenceView]


def step_views(samples: Sequence[SampledSequence]) -> list[StepView]:
    """Group the sequences by step; of many steps, take evenly spread ones with the first and the last."""
    ordered = sorted(samples, key=lambda sequence: (sequence.step, sequence.row))
    steps = [(step, list(sequences)) for step, sequences in groupby(ordered, key=lambda sequence: sequence.step)]
    return [_step_view(step, sequences) for step, sequences in spread(steps, STEPS_SHOWN)]


def shares_chart(steps: Sequence[StepView]) -> Markup:
    """Draw one bar a step: the teacher's share of the tokens."""
    return bars([step.teacher_share for step in steps], "teacher", width=480, height=44, stretch=True)


def _step_view(step: int, sequences: Sequence[SampledSequence]) -> StepView:
    views = [_sequence_view(sequence) for sequence in sequences]
    tokens = sum(view.tokens for view in views)
    return StepView(step, sum(view.by_teacher for view in views) / max(tokens, 1), views)


def _sequence_view(sequence: SampledSequence) -> SequenceView:
    shown = sequence.tokens[:TOKENS_SHOWN]
    return SequenceView(
        row=sequence.row,
        prompt=clipped(sequence.prompt, _PROMPT_SHOWN),
        response=Markup("").join(_token(token) for token in shown),
        tokens=len(sequence.tokens),
        left_out=len(sequence.tokens) - len(shown),
        by_teacher=sum(token.by == "teacher" for token in sequence.tokens),
    )


def _token(token: SampledToken) -> Markup:
    text = _text(token.text)
    proposal = token.proposal
    if proposal is None:
        return (_TEACHER if token.by == "teacher" else _STUDENT).format(text)
    details = _TIP.format(
        _text(proposal.text),
        f"{proposal.rank + 1:,}",
        percent(proposal.probability),
        text,
        f"{proposal.own_rank + 1:,}",
        percent(proposal.own_probability),
    )
    return _REPLACED.format(text, details)


def _text(text: str) -> str:
    """Return a token's text: line breaks marked, and a box where it only begins a character."""
    return visible(clipped(text, _TOKEN_SHOWN)).replace("\n", "↵\n") or "▯"
