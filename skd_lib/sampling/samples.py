"""What a sampled batch carries."""

from __future__ import annotations

from dataclasses import dataclass, fields

from torch import Tensor

STUDENT = 0
TEACHER = 1
"""Who wrote a token: the student's accepted draft, or the teacher's replacement or bonus."""


@dataclass(frozen=True)
class SamplingStatistics:
    """Counts over a sampled batch; add them up over batches, then read the ratios.

    Attributes:
        sequences: Sampled responses.
        tokens: Response tokens, EOS included; always accepted + replaced + bonus.
        drafted: Tokens the student drafted, wasted ones included.
        accepted: Drafted tokens that stand.
        replaced: Tokens the teacher sampled in place of a rejected draft, or with no draft at all.
        bonus: Tokens the teacher added after a whole accepted block.
        tested: Drafted tokens up to and including each block's first rejection.
        teacher_calls: Teacher forwards, counted once a row.
        student_calls: Student forwards, counted once a row.
        teacher_positions: Token positions that went through the teacher's decoder, prefill included, padding left out.
            Work done once more because memory ran out does not count: it is the device's, not the method's.
        student_positions: The same of the student's.
        truncated: Responses that ended by the length limit.
    """

    sequences: int = 0
    tokens: int = 0
    drafted: int = 0
    accepted: int = 0
    replaced: int = 0
    bonus: int = 0
    tested: int = 0
    teacher_calls: int = 0
    student_calls: int = 0
    teacher_positions: int = 0
    student_positions: int = 0
    truncated: int = 0

    def __add__(self, other: SamplingStatistics) -> SamplingStatistics:
        return SamplingStatistics(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    @property
    def acceptance_rate(self) -> float:
        """Accepted / tested; 1 where nothing was tested."""
        return self.accepted / self.tested if self.tested else 1.0

    @property
    def rejection_rate(self) -> float:
        """1 - acceptance rate. Near 0, SKD has become on-policy distillation."""
        return 1.0 - self.acceptance_rate

    @property
    def replacements_per_sequence(self) -> float:
        """Teacher replacements in a response, on average."""
        return self.replaced / max(self.sequences, 1)

    @property
    def tokens_per_teacher_call(self) -> float:
        """Block efficiency; 0 where the teacher was never asked."""
        return self.tokens / self.teacher_calls if self.teacher_calls else 0.0

    @property
    def truncated_fraction(self) -> float:
        """Share of responses that ended by the length limit."""
        return self.truncated / max(self.sequences, 1)


@dataclass(frozen=True)
class Samples:
    """Sampled responses, in the order of their prompts.

    Attributes:
        tokens_BT: Response token ids as sampled (never decoded and re-tokenised), right-padded.
        mask_BT: True on response tokens, EOS included.
        source_BT: `STUDENT` or `TEACHER`, int8.
        proposals_BT: The student's token in whose place a teacher's stands; -1 where there is none.
        truncated_B: The row ended by the length limit; no EOS is made up for it.
        teacher_states_BTH: The teacher's final hidden state from which it predicts each response token; None unless
            asked for.
        statistics: Counts over the batch.
    """

    tokens_BT: Tensor
    mask_BT: Tensor
    source_BT: Tensor
    proposals_BT: Tensor
    truncated_B: Tensor
    teacher_states_BTH: Tensor | None
    statistics: SamplingStatistics
