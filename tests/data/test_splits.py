"""Splits: the same whatever the order of the rows, without overlap, with the numbers asked for."""

from __future__ import annotations

import random
from typing import Any

import pytest

from skd_lib.config import DataConfig
from skd_lib.data.examples import Example, make_example
from skd_lib.data.sources import SourceSplits
from skd_lib.data.splits import Splits, complaints, make_splits
from skd_lib.errors import SkdError


def config(**values: Any) -> DataConfig:
    return DataConfig.model_validate({"source": {"type": "files", "train": ["unused.jsonl"]}, **values})


def rows(count: int, name: str = "train") -> list[Example]:
    texts = [f"{name} {random.Random(f'{name}{i}').getrandbits(200):x}" for i in range(count)]
    return [make_example(text, text.upper()) for text in texts]


def ids(examples: list[Example]) -> set[str]:
    return {example.id for example in examples}


def test_missing_splits_are_cut_from_train() -> None:
    splits = make_splits(SourceSplits(rows(200), None, None), config(test_fraction=0.2), seed=0)
    assert {name: len(part) for name, part in splits.named().items()} == {
        "train_teacher": 140,
        "train_student": 140,
        "validation": 20,
        "test": 40,
    }
    parts = [ids(splits.train_teacher), ids(splits.validation), ids(splits.test)]
    assert ids(rows(200)) == set.union(*parts)
    assert sum(len(part) for part in parts) == 200


def test_no_more_is_cut_than_asked_for() -> None:
    splits = make_splits(SourceSplits(rows(200), None, None), config(test_examples=5, validation_examples=3), seed=0)
    assert (len(splits.train_teacher), len(splits.validation), len(splits.test)) == (192, 3, 5)


def test_the_order_of_the_rows_does_not_matter_and_the_seed_does() -> None:
    def split(examples: list[Example], seed: int) -> Splits:
        return make_splits(SourceSplits(examples, None, None), config(student_examples=10), seed)

    shuffled = rows(100)
    random.Random(1).shuffle(shuffled)
    assert split(rows(100), seed=3) == split(shuffled, seed=3)
    assert split(rows(100), seed=3).test != split(rows(100), seed=4).test


def test_the_students_rows_are_among_the_teachers() -> None:
    source = SourceSplits(rows(100), rows(5, "validation"), rows(5, "test"))
    splits = make_splits(source, config(teacher_examples=60, student_examples=20), seed=0)
    assert len(splits.train_teacher) == 60
    assert splits.train_student == splits.train_teacher[:20]
    fewer = make_splits(source, config(teacher_examples=60, student_examples=10), seed=0)
    assert fewer.train_student == splits.train_student[:10]


def test_held_out_splits_win_over_train_and_test_over_validation() -> None:
    train, validation, test = rows(10), rows(4, "validation"), rows(4, "test")
    changed = make_example(test[1].source, test[1].target + ".")
    source = SourceSplits([*train, train[0], validation[0], test[0], changed], [*validation, test[2]], test)
    splits = make_splits(source, config(), seed=0)
    assert ids(splits.train_teacher) == ids(train)
    assert ids(splits.validation) == ids(validation)
    assert ids(splits.test) == ids(test)
    assert {reason: count for reason, count in splits.dropped.items() if count} == {
        "train: repeated": 1,
        "train: also held out": 2,
        "train: resembles a held-out row": 1,
        "validation: also in test": 1,
    }


def test_held_out_rows_beyond_the_limit_do_not_come_back_into_train() -> None:
    test = rows(10, "test")
    splits = make_splits(SourceSplits([*rows(20), *test], None, test), config(test_examples=2), seed=0)
    assert len(splits.test) == 2
    assert not ids(test) & (ids(splits.train_teacher) | ids(splits.validation))


def test_a_train_split_that_is_all_held_out_is_an_error() -> None:
    same = rows(5)
    with pytest.raises(SkdError, match=r"no row is left in the split `train`: 5 of 5 rows \(100%\) are left out"):
        make_splits(SourceSplits(same, rows(2, "validation"), same), config(), seed=0)


def test_what_each_split_loses_is_told_and_nearly_all_of_it_refused() -> None:
    test, validation, own = rows(40, "test"), rows(10, "validation"), rows(20)
    source = SourceSplits([*own, *test[:5], own[0]], [*validation, *test[:10]], [*test, test[0]])
    splits = make_splits(source, config(), seed=0)
    assert {name: loss.to_dict() for name, loss in splits.losses.items()} == {
        "train": {"rows": 26, "lost": {"repeated": 1, "also held out": 5}},
        "validation": {"rows": 20, "lost": {"also in test": 10}},
        "test": {"rows": 41, "lost": {"repeated": 1}},
    }
    ((name, level, error),) = complaints(splits.losses)
    assert (name, level) == ("validation", "warning")
    assert "10 of 20 rows (50%) are left out: 10 also in test" in error.what
    assert error.what.count("is like") == 3
    assert test[0].source[:20] in error.what
    with pytest.raises(SkdError, match=r"split `train`: 40 of 42 rows \(95%\) are left out: 40 also held out"):
        make_splits(SourceSplits([*own[:2], *test], validation, test), config(), seed=0)
    with pytest.raises(SkdError, match=r"40 repeated"):
        make_splits(SourceSplits([own[0]] * 41, validation, test), config(), seed=0)


def test_losses_of_splits_that_are_cut_count_their_own_rows() -> None:
    splits = make_splits(SourceSplits([*rows(100), *rows(100)[:50]], None, None), config(), seed=0)
    assert {name: (loss.rows, loss.lost) for name, loss in splits.losses.items()} == {
        "train": (130, 50),
        "validation": (10, 0),
        "test": (10, 0),
    }
    kept = {name: len(examples) for name, examples in splits.named().items()}
    assert kept["train_student"] == 130 - 50


def test_too_few_rows_to_cut_from_are_an_error() -> None:
    with pytest.raises(SkdError, match="2 training rows are too few") as caught:
        make_splits(SourceSplits(rows(2), None, None), config(), seed=0)
    assert "add rows" in caught.value.hint
    with pytest.raises(SkdError, match="from: 59 of 60 repeat another"):
        make_splits(SourceSplits(rows(1) * 60, None, None), config(), seed=0)
