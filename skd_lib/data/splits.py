"""From what a source holds to the four splits of a run: cut, deduplicated, drawn. The same seed gives the same rows,
in whatever order the source lists them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from skd_lib.config import DataConfig
from skd_lib.data.dedup import Kept, drop_repeated, drop_resembling
from skd_lib.data.examples import Example
from skd_lib.data.sources import SourceSplits
from skd_lib.errors import SkdError


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
        dropped: How many rows were dropped, by reason.
    """

    train_teacher: list[Example]
    train_student: list[Example]
    validation: list[Example]
    test: list[Example]
    held_out: dict[str, list[Example]] = field(default_factory=dict)
    dropped: dict[str, int] = field(default_factory=dict)

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
        SkdError: a split is empty, saying at which point it became so.
    """
    threshold = config.near_duplicate_threshold
    unique = {
        name: drop_repeated(examples)
        for name, examples in (("train", source.train), ("validation", source.validation), ("test", source.test))
        if examples is not None
    }
    present = {name: kept.examples for name, kept in unique.items()}
    cut = cut_missing(
        SourceSplits(present["train"], present.get("validation"), present.get("test")),
        config,
        seed,
    )
    test = shuffled(cut.test or [], seed)
    validation = drop_resembling(shuffled(cut.validation or [], seed), test, threshold)
    train = drop_resembling(cut.train, [*test, *validation.examples], threshold)
    dropped = {
        **{f"source: {reason}": count for reason, count in sorted(source.left_out.items())},
        **{f"{name}: repeated": kept.exact for name, kept in unique.items()},
        "train: also held out": train.exact,
        "train: resembles a held-out row": train.near,
        "validation: also in test": validation.exact,
        "validation: resembles a test row": validation.near,
    }
    left = {"train": train, "validation": validation}
    for split, kept in left.items():
        _check_left(split, kept)
    further = {name: drop_repeated(examples) for name, examples in (held_out or {}).items()}
    for name, own in further.items():
        dropped[f"held-out {name}: repeated"] = own.exact
        for split, kept in left.items():
            left[split] = drop_resembling(kept.examples, own.examples, threshold)
            dropped[f"{split}: also in held-out {name}"] = left[split].exact + left[split].near
            _check_left(split, left[split])
    limits = {each.name: each.examples for each in config.held_out}
    return Splits(
        train_teacher=left["train"].examples[: config.teacher_examples],
        train_student=left["train"].examples[: config.student_examples],
        validation=left["validation"].examples[: config.validation_examples],
        test=test[: config.test_examples],
        held_out={name: shuffled(own.examples, seed)[: limits[name]] for name, own in further.items()},
        dropped=dropped,
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


def _check_left(name: str, kept: Kept) -> None:
    if not kept.examples:
        raise SkdError(
            f"no row is left in the split `{name}`: {kept.exact} are held out, {kept.near} resemble a held-out row",
            where="data.source",
            hint="give splits that do not overlap, or raise `data.near_duplicate_threshold`",
        )
