"""Rows that are also in a held-out split, word for word or nearly, are dropped from the split they would leak into."""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import NamedTuple

from skd_lib.data.examples import Example

NGRAM = 5
_SPACES = re.compile(r"\s+")


class Kept(NamedTuple):
    """The rows that stay, in their order, and how many were dropped."""

    examples: list[Example]
    exact: int
    near: int


def normalise(example: Example) -> str:
    """Source and target as one text: Unicode NFKC, case folded, white space collapsed."""
    source, target = (
        _SPACES.sub(" ", unicodedata.normalize("NFKC", text).casefold()).strip()
        for text in (example.source, example.target)
    )
    return f"{source}\n{target}"


def ngrams(text: str) -> set[str]:
    """The character 5-grams of a text; a shorter text is one gram."""
    return {text[start : start + NGRAM] for start in range(max(1, len(text) - NGRAM + 1))}


def drop_repeated(examples: Iterable[Example]) -> Kept:
    """Keep the first of rows with the same source and target, letter for letter."""
    examples = list(examples)
    first = list({(example.source, example.target): example for example in reversed(examples)}.values())[::-1]
    return Kept(first, len(examples) - len(first), 0)


def drop_resembling(examples: Iterable[Example], held_out: Iterable[Example], threshold: float) -> Kept:
    """Drop the rows that equal a held-out row once normalised, or whose 5-grams' Jaccard similarity with one is above
    `threshold` (1: equal ones only).

    The similarity join is exact, by prefix filtering (Bayardo et al. 2007, "Scaling up all pairs similarity search").
    Grams are put in one order, rare ones first. Two sets of similarity t share at least t times the size of the
    larger one, so they share a gram among the first `size - ceil(t * size) + 1` of each: only held-out rows found
    through those are compared.

    Cost: linear in the characters of both sides at thresholds like 0.9 (100,000 rows of 200 characters against 5,000:
    under a minute on one core); low thresholds compare more and more pairs. Memory: the grams of the held-out rows,
    about 100 bytes a character.
    """
    index = _HeldOut(held_out, threshold)
    kept, exact, near = [], 0, 0
    for example in examples:
        text = normalise(example)
        if text in index.texts:
            exact += 1
        elif threshold < 1 and index.has_near(text):
            near += 1
        else:
            kept.append(example)
    return Kept(kept, exact, near)


class _HeldOut:
    def __init__(self, examples: Iterable[Example], threshold: float) -> None:
        self.texts = {normalise(example) for example in examples}
        self._threshold = threshold
        rows = [ngrams(text) for text in sorted(self.texts)] if threshold < 1 else []
        frequency = Counter(gram for row in rows for gram in row)
        order = sorted(frequency, key=lambda gram: (frequency[gram], gram))
        self._rank = {gram: rank for rank, gram in enumerate(order)}
        self._rows = [frozenset(self._rank[gram] for gram in row) for row in rows]
        self._by_gram: defaultdict[int, list[int]] = defaultdict(list)
        for number, row in enumerate(self._rows):
            for gram in sorted(row)[: self._prefix(len(row))]:
                self._by_gram[gram].append(number)

    def has_near(self, text: str) -> bool:
        grams = ngrams(text)
        known = sorted(self._rank[gram] for gram in grams if gram in self._rank)
        # Grams that no held-out row has come first in the order: they are the rarest, and lead nowhere.
        prefix = known[: max(0, self._prefix(len(grams)) - (len(grams) - len(known)))]
        candidates = {number for gram in prefix for number in self._by_gram.get(gram, ())}
        return any(self._similar(len(grams), known, self._rows[number]) for number in candidates)

    def _prefix(self, size: int) -> int:
        # The small number guards against 0.9 * 10 = 9.000000000000002, which would make the prefix too short.
        return size - math.ceil(self._threshold * size - 1e-9) + 1

    def _similar(self, size: int, known: list[int], row: frozenset[int]) -> bool:
        # No more can be shared than the smaller one has: most candidates go by their size alone.
        if min(size, len(known), len(row)) <= self._threshold * max(size, len(row)):
            return False
        shared = len(row.intersection(known))
        return shared > self._threshold * (size + len(row) - shared)
