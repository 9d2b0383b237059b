"""What each split loses before anything is trained or measured on it, and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from skd_lib.data.examples import Example
from skd_lib.errors import SkdError

WARN_ABOVE, REFUSE_ABOVE = 1 / 3, 0.9
"""Shares of a split: losing more of it is hardly meant."""
SHOWN_PAIRS = 3
_SHOWN_CHARACTERS = 160

Pair = tuple[Example, Example]
"""A row that was dropped, and the one it repeats or resembles."""


@dataclass
class Loss:
    """What one split loses.

    Attributes:
        rows: How many there were.
        reasons: How many were left out, by reason; estimated where `looked_at` is less than `rows`.
        pairs: A few rows that were dropped, each with the one that stays.
        looked_at: How many were compared with held-out rows; None for all.
    """

    rows: int
    reasons: Counter[str] = field(default_factory=Counter)
    pairs: list[Pair] = field(default_factory=list)
    looked_at: int | None = None

    @property
    def lost(self) -> int:
        """How many are left out."""
        return sum(self.reasons.values())

    @property
    def share(self) -> float:
        """Of all rows, 0 to 1."""
        return self.lost / self.rows if self.rows else 0.0

    def to_dict(self) -> dict[str, Any]:
        """The counts as plain JSON values."""
        return {"rows": self.rows, "lost": {reason: count for reason, count in self.reasons.items() if count}}

    def __str__(self) -> str:
        reasons = in_words(self.reasons)
        about, looked = "", ""
        if self.looked_at is not None:
            about, looked = "about ", f" (near copies were looked for in {self.looked_at:,} rows)"
        return (
            f"{about}{self.lost:,} of {self.rows:,} rows ({self.share:.0%}) are left out: {reasons or 'none'}{looked}"
        )


def in_words(reasons: Mapping[str, int]) -> str:
    """How many rows were left out, and why, on one line."""
    return ", ".join(
        f"{count:,} {reason if count == 1 else reason.replace('resembles', 'resemble')}"
        for reason, count in reasons.items()
        if count
    )


def with_long_prompts(losses: Mapping[str, Any], split: str, rows: int, count: int) -> dict[str, Any]:
    """Losses as `prepare_data` described them (`Loss.to_dict`), and what a training left out on top of that.

    Args:
        losses: By split.
        split: A split that was trained on.
        rows: How many examples it has.
        count: How many of them have prompts over the limit.
    """
    known = losses.get(split, {"rows": rows, "lost": {}})
    lost = known["lost"] | ({"with prompts over max_prompt_tokens": count} if count else {})
    return {**losses, split: {"rows": known["rows"], "lost": lost}}


def complaint(name: str, loss: Loss) -> SkdError | None:
    """What is wrong with a split that loses more than `WARN_ABOVE`, with examples; None for another."""
    if loss.share <= WARN_ABOVE:
        return None
    start = f"no row is left in the split `{name}`: " if loss.lost >= loss.rows else f"split `{name}`: "
    pairs = f"\nfor example\n{_shown_pairs(loss.pairs)}" if loss.pairs else ""
    hint = "remove what is there twice, or give splits that do not overlap"
    if any("resembles" in reason or "held-out" in reason for reason in loss.reasons if loss.reasons[reason]):
        hint += "; where rows that resemble each other are no copies, raise `data.near_duplicate_threshold`"
    return SkdError(f"{start}{loss}{pairs}", where="data.source", hint=hint)


def _shown_pairs(pairs: Iterable[Pair]) -> str:
    return "\n".join(f"- {_shown(dropped)}\n  is like {_shown(stays)}" for dropped, stays in list(pairs)[:SHOWN_PAIRS])


def _shown(example: Example) -> str:
    text = " ".join(f"{example.source} -> {example.target}".split())
    text = text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}..."
    return f"[{example.origin}] {text}" if example.origin else text
