"""Datasets of which every answer of a conversation is a row, and checks of rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from torch.utils.data import IterableDataset

from skd_lib.data.formats import each_turn
from skd_lib.data.tokenize import TokenizedExample
from skd_lib.distillation.batch import Rollout
from skd_lib.errors import SkdError

Row = Mapping[str, Any]
Format = Callable[[Any], Row] | None


class TurnRows(list[Row]):
    """The rows of a dataset that has a length."""


class TurnStream(IterableDataset[Row]):
    """The rows of a dataset that can only be iterated over."""

    def __init__(self, dataset: Iterable[Any], form: Format, where: str) -> None:
        self._dataset, self._form, self._where = dataset, form, where

    def __iter__(self) -> Iterator[Row]:
        return each_turn(_formatted(self._dataset, self._form), self._where)

    def set_epoch(self, epoch: int) -> None:
        """Hand the epoch on to the dataset, which may be shuffled by it."""
        if hasattr(self._dataset, "set_epoch"):
            self._dataset.set_epoch(epoch)


def by_turn(dataset: Any, form: Format, where: str) -> Any:
    """Return a dataset, or a dictionary of datasets, with a row for each answer; of what has been made so, itself.

    `form` turns a row into one of a known format; errors call the dataset `where`.
    """
    if dataset is None or isinstance(dataset, TurnRows | TurnStream):
        return dataset
    if isinstance(dataset, dict):
        return {name: by_turn(part, form, f"{where}, `{name}`") for name, part in dataset.items()}
    if hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__"):
        rows = dataset if hasattr(dataset, "__iter__") else (dataset[index] for index in range(len(dataset)))
        return TurnRows(each_turn(_formatted(rows, form), where))
    return TurnStream(dataset, form, where)


def place_of(row: Any, datasets: Mapping[str, Any]) -> str:
    """Return the dataset that holds a row, and the row's number in it, from 1; `dataset` where none of them does.

    Each dataset is read up to the row, so this is for errors only; streams are not read a second time.
    """
    for name, dataset in datasets.items():
        if isinstance(dataset, dict):
            found = place_of(row, {f"{name}, `{key}`": part for key, part in dataset.items()})
            if found != "dataset":
                return found
        elif hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__"):
            same = (number for number in range(len(dataset)) if repr(dataset[number]) == repr(row))
            if (number := next(same, None)) is not None:
                return f"{name}, {'answer' if isinstance(dataset, TurnRows) else 'row'} {number + 1}"
    return "dataset"


def _formatted(rows: Iterable[Any], form: Format) -> Iterable[Row]:
    return rows if form is None else map(form, rows)


def check_collated(batch: Any) -> None:
    """Check that a data collator returns what it has to."""
    if not isinstance(batch, list) or not all(isinstance(one, TokenizedExample) for one in batch):
        what = f"it returns a {type(batch).__name__}, not a list of `skd_lib.data.tokenize.TokenizedExample`"
        hint = "leave it out: rows of `messages`, or of `prompt` and `completion`, are tokenised here"
        raise SkdError(what, where="SKDTrainer, data_collator", hint=hint)


def check_responses(rollout: Rollout, where: str) -> None:
    """Check that the responses of a dataset are not empty."""
    hint = "give it a `completion` or an assistant message"
    if where == "train_dataset":
        hint += ", or train by a method that samples every response"
    rows = zip(rollout.sources, rollout.lengths, strict=True)
    if any(source == "ground_truth" and not length for source, length in rows):
        raise SkdError(
            "a row has no response, so it has no loss",
            where=where,
            hint=hint,
        )
