"""Splits of a run: the rows of a source, without duplicates, shuffled, cut and drawn.

The same seed gives the same rows, in whatever order the source lists them.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from skd_lib.config import DataConfig
from skd_lib.data.dedup import SHOWN_PAIRS, Pair, drop_repeated, drop_resembling
from skd_lib.data.examples import Example, by_turn
from skd_lib.data.sources import SourceSplits
from skd_lib.errors import SkdError, SkdErrors

RUN_SPLITS = ("train", "validation", "test")
WARN_ABOVE, REFUSE_ABOVE = 1 / 3, 0.9
"""Shares of a split: losing more of it is hardly intended."""
_SHOWN_CHARACTERS = 160
_EXAMPLES = "\nfor example"


@dataclass
class LostRows:
    """The rows that one split loses before anything is trained or measured on it.

    Attributes:
        rows: The rows before.
        reasons: Rows that are left out, by reason; estimated where `looked_at` is less than `rows`.
        pairs: A few rows that were dropped, each with the one that stays.
        looked_at: Rows that were compared with held-out rows; None for all.
    """

    rows: int
    reasons: Counter[str] = field(default_factory=Counter)
    pairs: list[Pair] = field(default_factory=list)
    looked_at: int | None = None

    @property
    def lost(self) -> int:
        """Return the number of rows that are left out."""
        return sum(self.reasons.values())

    @property
    def share(self) -> float:
        """Return the share of rows that are left out, 0 to 1."""
        return self.lost / self.rows if self.rows else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return the counts as plain JSON values."""
        return {"rows": self.rows, "lost": {reason: count for reason, count in self.reasons.items() if count}}

    def __str__(self) -> str:
        reasons = in_words(self.reasons) or "none"
        about, looked = "", ""
        if self.looked_at is not None:
            about, looked = "about ", f" (near copies were looked for in {self.looked_at:,} rows)"
        return f"{about}{self.lost:,} of {self.rows:,} rows ({self.share:.0%}) are left out: {reasons}{looked}"


def in_words(reasons: Mapping[str, int]) -> str:
    """Return counts of rows that were left out, by reason, as one line."""
    return ", ".join(
        f"{count:,} {reason if count == 1 else reason.replace('resembles', 'resemble')}"
        for reason, count in reasons.items()
        if count
    )


def with_long_prompts(losses: Mapping[str, Any], split: str, rows: int, count: int) -> dict[str, Any]:
    """Add to losses (of `LostRows.to_dict`, by split) the `count` of `rows` with prompts over the limit."""
    known = losses.get(split, {"rows": rows, "lost": {}})
    lost = known["lost"] | ({"with prompts over max_prompt_tokens": count} if count else {})
    return {**losses, split: {"rows": known["rows"], "lost": lost}}


@dataclass(frozen=True)
class Splits:
    """The splits of one run, and the rows that each has lost (`train`, `validation`, `test`, `held-out NAME`).

    Teacher and student train on the first rows of one shuffled set, so the larger of the two contains the smaller.
    `left_out` counts entries that the source itself left out, by reason.
    """

    train_teacher: list[Example]
    train_student: list[Example]
    validation: list[Example]
    test: list[Example]
    held_out: dict[str, list[Example]] = field(default_factory=dict)
    losses: dict[str, LostRows] = field(default_factory=dict)
    left_out: dict[str, int] = field(default_factory=dict)

    @property
    def dropped(self) -> dict[str, int]:
        """Return the number of rows that were dropped, by split and reason."""
        of_source = {f"source: {reason}": count for reason, count in sorted(self.left_out.items())}
        return of_source | {
            f"{name}: {reason}": count for name, loss in self.losses.items() for reason, count in loss.reasons.items()
        }

    def by_turn(self) -> Splits:
        """Return these splits with one example for each answer of a conversation, but for the tests.

        Tests ask for the last answer of a conversation: several of one would not be independent of each other.
        """

        def turns(examples: list[Example]) -> list[Example]:
            return [turn for example in examples for turn in by_turn(example)]

        return replace(
            self,
            train_teacher=turns(self.train_teacher),
            train_student=turns(self.train_student),
            validation=turns(self.validation),
        )

    def named(self) -> dict[str, list[Example]]:
        """Return the run's own splits by name, in the order they are written."""
        return {
            "train_teacher": self.train_teacher,
            "train_student": self.train_student,
            "validation": self.validation,
            "test": self.test,
        }


def shuffled(examples: Sequence[Example], seed: int) -> list[Example]:
    """Return examples in an order that depends on the seed and on each example's content only."""
    return sorted(examples, key=lambda example: hashlib.sha256(f"{seed}:{example.id}".encode()).digest())


def _cut_missing(source: SourceSplits, config: DataConfig, seed: int) -> SourceSplits:
    """Cut test and validation from train where the source has none: a fraction, or a number of examples if less."""
    train, validation, test = shuffled(source.train, seed), source.validation, source.test
    total = len(train)
    if test is None:
        train, test = _cut(train, total, config.test_fraction, config.test_examples, "test")
    if validation is None:
        train, validation = _cut(train, total, config.validation_fraction, config.validation_examples, "validation")
    return SourceSplits(train, validation, test, source.left_out)


def make_splits(
    source: SourceSplits, config: DataConfig, seed: int, held_out: Mapping[str, Sequence[Example]] | None = None
) -> Splits:
    """Make the splits of a run, see `divide`."""
    splits = divide(source, config, seed, held_out)
    if errors := [error for name, level, error in complaints(splits.losses) if level == "error"]:
        raise SkdErrors(errors)
    return splits


def complaints(losses: Mapping[str, LostRows]) -> list[tuple[str, Literal["warning", "error"], SkdError]]:
    """Return the splits that lose many rows, with the level of the problem; a held-out set is never an error."""
    return [
        (name, "error" if loss.share > REFUSE_ABOVE and name in RUN_SPLITS else "warning", _complaint(name, loss))
        for name, loss in losses.items()
        if loss.share > WARN_ABOVE
    ]


def _complaint(name: str, loss: LostRows) -> SkdError:
    start = f"no row is left in the split `{name}`: " if loss.lost >= loss.rows else f"split `{name}`: "
    pairs = "".join(f"\n- {_shown(gone)}\n  is like {_shown(stays)}" for gone, stays in loss.pairs[:SHOWN_PAIRS])
    hint = "remove what is there twice, or give splits that do not overlap"
    if any("resembles" in reason or "held-out" in reason for reason in loss.reasons if loss.reasons[reason]):
        hint += "; where rows that resemble each other are no copies, raise `data.near_duplicate_threshold`"
    return SkdError(f"{start}{loss}{pairs and _EXAMPLES + pairs}", where="data.source", hint=hint)


def _shown(example: Example) -> str:
    text = " ".join(f"{example.source} -> {example.target}".split())
    text = text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}..."
    return f"[{example.origin}] {text}" if example.origin else text


def divide(
    source: SourceSplits,
    config: DataConfig,
    seed: int,
    held_out: Mapping[str, Sequence[Example]] | None = None,
    characters: int | None = None,
) -> Splits:
    """Make the splits of a run, any of which may be empty.

    A row that is in several splits, exactly or nearly (`data.near_duplicate_threshold`), stays in the held-out one:
    test and the held-out sets (`held_out`, those that could be read) win over validation, all win over train. For a
    quick look (`characters`, see `drop_resembling`) the number of rows that are nearly held out is estimated, and only
    those that were found are left out.
    """
    threshold = config.near_duplicate_threshold
    losses: dict[str, LostRows] = {}

    def unique(name: str, examples: Sequence[Example]) -> list[Example]:
        kept = drop_repeated(examples)
        losses[name] = LostRows(len(examples), Counter({"repeated": kept.exact}), [] if config.private else kept.pairs)
        return kept.examples

    def apart(name: str, examples: list[Example], others: Sequence[Example], exact: str, near: str) -> list[Example]:
        kept = drop_resembling(examples, others, threshold, characters)
        loss, compared = losses[name], kept.compared
        loss.reasons[exact] += kept.exact
        if compared is None:
            loss.reasons[near] += kept.near
        else:
            loss.reasons[near] += round(kept.near * (len(examples) - kept.exact) / max(1, compared))
            loss.looked_at = min(compared, loss.looked_at or compared)
        loss.pairs += [] if config.private else kept.pairs
        return kept.examples

    present = {
        name: unique(name, examples)
        for name, examples in (("train", source.train), ("validation", source.validation), ("test", source.test))
        if examples is not None
    }
    try:
        cut = _cut_missing(SourceSplits(present["train"], present.get("validation"), present.get("test")), config, seed)
    except SkdError as error:
        repeated = losses["train"].lost
        what = f"{error.what}: {repeated:,} of {losses['train'].rows:,} repeat another" if repeated else error.what
        raise SkdError(what, where=error.where, hint=error.hint) from error
    train, validation, test = cut.train, shuffled(cut.validation or [], seed), shuffled(cut.test or [], seed)
    for name, rows in (("validation", validation), ("test", test)):
        if name not in losses:
            losses[name] = LostRows(len(rows))
            losses["train"].rows -= len(rows)
    validation = apart("validation", validation, test, "also in test", "resembles a test row")
    train = apart("train", train, [*test, *validation], "also held out", "resembles a held-out row")
    further = {name: unique(f"held-out {name}", rows) for name, rows in (held_out or {}).items()}
    for name, rows in further.items():
        reason = f"also in held-out {name}"
        train = apart("train", train, rows, reason, reason)
        validation = apart("validation", validation, rows, reason, reason)
    limits = {each.name: each.examples for each in config.held_out}
    return Splits(
        train_teacher=train[: config.teacher_examples],
        train_student=train[: config.student_examples],
        validation=validation[: config.validation_examples],
        test=test[: config.test_examples],
        held_out={name: shuffled(rows, seed)[: limits[name]] for name, rows in further.items()},
        losses=losses,
        left_out=dict(source.left_out),
    )


def _cut(
    train: list[Example], total: int, fraction: float, at_most: int | None, name: str
) -> tuple[list[Example], list[Example]]:
    count = max(1, round(fraction * total))
    count = count if at_most is None else min(count, at_most)
    if len(train) <= count:
        raise SkdError(
            f"{total} training rows are too few to cut a {name} split from",
            where=f"data.{name}_fraction",
            hint=f"add rows, or give the source a {name} split of its own",
        )
    return train[count:], train[:count]
