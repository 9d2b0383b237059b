"""Removal of duplicates: rows of a split that are in it twice, or that a held-out split holds, exactly or nearly."""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable
from itertools import accumulate, chain
from typing import NamedTuple

from skd_lib.data.examples import Example

NGRAM = 5
SHOWN_PAIRS = 3
Pair = tuple[Example, Example]
"""A row that was dropped, and the one it repeats or resembles."""
QUICK_PAIRS = 500_000
"""Pairs of rows that a quick look compares: about two seconds."""
_SPACES = re.compile(r"\s+")
# With a sign where no word or number comes before it, groups of thousands, and decimals after a point or a comma.
_NUMBER = re.compile(r"(?<![\w.,)\]])[-\u2212](?=\d)|\d{1,3}(?:,\d{3})+(?:\.\d+)?(?![\d,])|\d+(?:[.,]\d+)*")
_GROUPED = re.compile(r"\d{1,3}(?:,\d{3})+(?:\.\d+)?")


class Kept(NamedTuple):
    """The rows that stay, in their order; counts of those that were dropped, word for word or nearly; a few of these.

    `compared` counts the rows that were compared for near copies; None if all, with all.
    """

    examples: list[Example]
    exact: int
    near: int
    pairs: list[Pair]
    compared: int | None = None


def normalise(example: Example) -> str:
    """Return source and target as one text: Unicode NFKC, case folded, white space collapsed."""
    source, target = (
        _SPACES.sub(" ", unicodedata.normalize("NFKC", text).casefold()).strip()
        for text in (example.source, example.target)
    )
    return f"{source}\n{target}"


def ngrams(text: str) -> set[str]:
    """Return the character 5-grams of a text; a shorter text is one gram."""
    return {text[start : start + NGRAM] for start in range(max(1, len(text) - NGRAM + 1))}


def numbers(text: str) -> tuple[str, ...]:
    """Return the numbers of a text in their order, as digits: `1,234` is `1234`, `3,5` is `3.5`."""
    found, sign = list[str](), ""
    for number in _NUMBER.findall(text):
        if number[0] in "-\u2212":
            sign = "-"
            continue
        grouped = _GROUPED.fullmatch(number) is not None
        found.append(sign + number.replace(",", "" if grouped else "."))
        sign = ""
    return tuple(found)


def drop_repeated(examples: Iterable[Example]) -> Kept:
    """Keep the first of rows with the same source and target, or the same conversation, letter for letter."""
    first: dict[tuple[str, ...], Example] = {}
    dropped, pairs = 0, list[Pair]()
    for example in examples:
        text = (example.source, example.target, *(() if example.conversation is None else (example.id,)))
        if text not in first:
            first[text] = example
            continue
        dropped += 1
        if len(pairs) < SHOWN_PAIRS:
            pairs.append((example, first[text]))
    return Kept(list(first.values()), dropped, 0, pairs)


def drop_resembling(
    examples: Iterable[Example], held_out: Iterable[Example], threshold: float, characters: int | None = None
) -> Kept:
    """Drop the rows that a held-out row equals once normalised, or nearly.

    Near copies have the same numbers in the same order (rows made from one form differ in little else, and are no
    duplicates), and a Jaccard similarity of 5-grams above `threshold` (1: equal ones only). For a quick look, only the
    first rows with `characters` in all are compared, with as many first held-out ones, up to `QUICK_PAIRS` pairs.

    The similarity join is exact, by prefix filtering (Bayardo et al. 2007, "Scaling up all pairs similarity search").
    Grams are put in one order, rare ones first. Two sets of similarity t share at least t times the size of the
    larger one, so they share a gram among the first `size - ceil(t * size) + 1` of each: only held-out rows found
    through those are compared.

    Cost: linear in the characters of both sides at thresholds like 0.9 (100,000 rows of 200 characters against 5,000:
    under a minute on one core); low thresholds compare more and more pairs. Memory: the grams of the held-out rows,
    about 100 bytes a character.
    """
    rows = [(normalise(example), example) for example in examples]
    texts: dict[str, Example] = {}
    for example in held_out:
        texts.setdefault(normalise(example), example)
    others = [(text, row) for text, row in rows if text not in texts]
    compared = _within([text for text, _ in others], characters) if threshold < 1 else 0
    known = list(texts)[: _within(list(texts), characters) if threshold < 1 else 0]
    index = _NearRows(known, threshold)
    like = list[str | None]()
    for text, _ in others[:compared]:
        if characters is not None and index.pairs >= QUICK_PAIRS:
            break
        like.append(index.find(text))
    compared = len(like)
    near = [text for text in like if text is not None]
    pairs = [(row, texts[text]) for text, row in rows if text in texts]
    pairs += [(row, texts[text]) for (_, row), text in zip(others, like, strict=False) if text is not None]
    partly = threshold < 1 and (compared < len(others) or len(known) < len(texts))
    kept = [row for (_, row), text in zip(others, like, strict=False) if text is None]
    kept += [row for _, row in others[compared:]]
    return Kept(kept, len(rows) - len(others), len(near), pairs[:SHOWN_PAIRS], compared if partly else None)


def _within(texts: list[str], characters: int | None) -> int:
    """Return the number of first texts whose characters together are at most `characters`."""
    if characters is None:
        return len(texts)
    return sum(1 for total in accumulate(map(len, texts)) if total <= characters)


class _NearRows:
    def __init__(self, texts: list[str], threshold: float) -> None:
        self._threshold = threshold
        self.pairs = 0
        self._texts = sorted(texts)
        rows = [ngrams(text) for text in self._texts]
        frequency = Counter(gram for row in rows for gram in row)
        order = sorted(frequency, key=lambda gram: (frequency[gram], gram))
        self._rank = {gram: rank for rank, gram in enumerate(order)}
        self._rows = [frozenset(self._rank[gram] for gram in row) for row in rows]
        # Rows with other numbers are never compared: of those made from one form that would be all with all.
        self._by_numbers: defaultdict[tuple[str, ...], defaultdict[int, list[int]]] = defaultdict(
            lambda: defaultdict(list)
        )
        for number, (text, row) in enumerate(zip(self._texts, self._rows, strict=True)):
            by_gram = self._by_numbers[numbers(text)]
            for gram in sorted(row)[: self._prefix(len(row))]:
                by_gram[gram].append(number)

    def find(self, text: str) -> str | None:
        """Find a row that is nearly this one; `pairs` counts those that are compared."""
        by_gram = self._by_numbers.get(numbers(text))
        if by_gram is None:
            return None
        grams = ngrams(text)
        known = sorted(self._rank[gram] for gram in grams if gram in self._rank)
        # Grams that no held-out row has come first in the order: they are the rarest, and lead nowhere.
        prefix = known[: max(0, self._prefix(len(grams)) - (len(grams) - len(known)))]
        seen = set[int]()
        for number in chain.from_iterable(by_gram.get(gram, ()) for gram in prefix):
            if number in seen:
                continue
            seen.add(number)
            self.pairs += 1
            if self._similar(len(grams), known, self._rows[number]):
                return self._texts[number]
        return None

    def _prefix(self, size: int) -> int:
        # The small number guards against 0.9 * 10 = 9.000000000000002, which would make the prefix too short.
        return size - math.ceil(self._threshold * size - 1e-9) + 1

    def _similar(self, size: int, known: list[int], row: frozenset[int]) -> bool:
        # No more can be shared than the smaller one has: most candidates go by their size alone.
        if min(size, len(known), len(row)) <= self._threshold * max(size, len(row)):
            return False
        shared = len(row.intersection(known))
        return shared > self._threshold * (size + len(row) - shared)
