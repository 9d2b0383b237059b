"""From what a source holds to the four splits of a run: cut, deduplicated, drawn. The same seed gives the same rows,
in whatever order the source lists them."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from skd_lib.config import DataConfig
from skd_lib.data.dedup import drop_repeated, drop_resembling
from skd_lib.data.examples import Example
from skd_lib.data.losses import REFUSE_ABOVE, Loss, complaint
from skd_lib.data.sources import SourceSplits
from skd_lib.errors import SkdError, SkdErrors

RUN_SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Splits:
    """The splits of one run.

    Attributes:
        train_teacher: For the teacher's fine-tuning.
        train_student: For the student; the first rows of the same shuffled training set, so the smaller of the two
            is contained in the larger.
        validation: To choose checkpoints.
        test: To measure.
        held_out: Further test sets, by name.
        losses: What was dropped, by split: `train`, `validation`, `test`, `held-out NAME`.
        left_out: How many entries the source itself left out, by reason.
    """

    train_teacher: list[Example]
    train_student: list[Example]
    validation: list[Example]
    test: list[Example]
    held_out: dict[str, list[Example]] = field(default_factory=dict)
    losses: dict[str, Loss] = field(default_factory=dict)
    left_out: dict[str, int] = field(default_factory=dict)

    @property
    def dropped(self) -> dict[str, int]:
        """How many rows were dropped, by split and reason."""
        of_source = {f"source: {reason}": count for reason, count in sorted(self.left_out.items())}
        return of_source | {
            f"{name}: {reason}": count for name, loss in self.losses.items() for reason, count in loss.reasons.items()
        }

    def named(self) -> dict[str, list[Example]]:
        """The run's own splits by name, in the order they are written."""
        return {
            "train_teacher": self.train_teacher,
            "train_student": self.train_student,
            "validation": self.validation,
            "test": self.test,
        }


def shuffled(examples: Sequence[Example], seed: int) -> list[Example]:
    """In an order that depends on the seed and on each example's content only."""
    return sorted(examples, key=lambda example: hashlib.sha256(f"{seed}:{example.id}".encode()).digest())


def cut_missing(source: SourceSplits, config: DataConfig, seed: int) -> SourceSplits:
    """Cut test and validation from train where the source has none: the configured fraction, or the configured number
    of examples if that is less.

    Raises:
        SkdError: train is too small to be cut.
    """
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
    """Make the splits of a run.

    A row that is in several splits, exactly or nearly (`data.near_duplicate_threshold`), stays in the held-out one:
    test and the held-out sets win over validation, all win over train.

    Args:
        source: What the source holds.
        config: How it is split.
        seed: Seed of the order.
        held_out: The sets of `config.held_out` that could be read, by name.

    Raises:
        SkdErrors: more than nine in ten rows of a split are lost, with examples.
        SkdError: train is too small to be cut.
    """
    splits = divide(source, config, seed, held_out)
    if errors := [error for name, level, error in complaints(splits.losses) if level == "error"]:
        raise SkdErrors(errors)
    return splits


def complaints(losses: Mapping[str, Loss]) -> list[tuple[str, Literal["warning", "error"], SkdError]]:
    """What is wrong with splits that lose many rows. Of a held-out set, which no run needs, none is an error."""
    found = ((name, loss, complaint(name, loss)) for name, loss in losses.items())
    return [
        (name, "error" if loss.share > REFUSE_ABOVE and name in RUN_SPLITS else "warning", error)
        for name, loss, error in found
        if error
    ]


def divide(
    source: SourceSplits,
    config: DataConfig,
    seed: int,
    held_out: Mapping[str, Sequence[Example]] | None = None,
    characters: int | None = None,
) -> Splits:
    """As `make_splits`, but a split may be empty.

    Args:
        source, config, seed, held_out: As there.
        characters: For a quick look, see `drop_resembling`: how many rows are nearly held out is estimated then, and
            only those that were found are left out.

    Raises:
        SkdError: train is too small to be cut.
    """
    threshold = config.near_duplicate_threshold
    losses: dict[str, Loss] = {}

    def unique(name: str, examples: Sequence[Example]) -> list[Example]:
        kept = drop_repeated(examples)
        losses[name] = Loss(len(examples), Counter({"repeated": kept.exact}), kept.pairs)
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
        loss.pairs += kept.pairs
        return kept.examples

    present = {
        name: unique(name, examples)
        for name, examples in (("train", source.train), ("validation", source.validation), ("test", source.test))
        if examples is not None
    }
    try:
        cut = cut_missing(SourceSplits(present["train"], present.get("validation"), present.get("test")), config, seed)
    except SkdError as error:
        repeated = losses["train"].lost
        what = f"{error.what}: {repeated:,} of {losses['train'].rows:,} repeat another" if repeated else error.what
        raise SkdError(what, where=error.where, hint=error.hint) from error
    train, validation, test = cut.train, shuffled(cut.validation or [], seed), shuffled(cut.test or [], seed)
    for name, rows in (("validation", validation), ("test", test)):
        if name not in losses:
            losses[name] = Loss(len(rows))
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
