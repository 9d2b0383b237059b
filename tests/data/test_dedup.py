"""Near duplicates: the join equals a comparison of every pair, and finds what a person would call a copy."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from skd_lib.data.dedup import drop_repeated, drop_resembling, ngrams, normalise, numbers
from skd_lib.data.examples import Example, make_example


def example(text: str, target: str = "answer") -> Example:
    return make_example(text, target)


def brute_force(rows: list[Example], held_out: list[Example], threshold: float) -> list[Example]:
    kept = []
    for row in rows:
        grams = ngrams(normalise(row))
        texts = [normalise(other) for other in held_out]
        others = [
            (text, ngrams(text)) for text in texts if text == normalise(row) or numbers(text) == numbers(normalise(row))
        ]
        same = any(normalise(row) == text for text, _ in others)
        near = any(len(grams & other) > threshold * len(grams | other) for _, other in others)
        if not same and not (near and threshold < 1):
            kept.append(row)
    return kept


# Few letters and short texts, so that similar pairs are common.
TEXTS = st.lists(st.text(alphabet="abA 12", min_size=1, max_size=24).map(example), max_size=12)


@settings(max_examples=200, deadline=None)
@given(TEXTS, TEXTS, st.sampled_from([0.1, 0.3, 0.5, 0.8, 0.9, 1.0]))
def test_equals_comparing_every_pair(rows: list[Example], held_out: list[Example], threshold: float) -> None:
    kept = drop_resembling(rows, held_out, threshold)
    assert kept.examples == brute_force(rows, held_out, threshold)
    assert len(kept.examples) + kept.exact + kept.near == len(rows)


def test_copies_that_differ_in_case_spacing_or_unicode_form_are_exact() -> None:
    held_out = [example("Le café\u00a0est fermé.", "The café is closed.")]
    rows = [example("LE  CAFE\u0301 EST\nFERMÉ. ", "the café is closed."), example("Le thé est fermé.")]
    kept = drop_resembling(rows, held_out, threshold=1)
    assert kept.examples == rows[1:]
    assert (kept.exact, kept.near) == (1, 0)


def test_a_small_change_in_a_long_text_is_near_and_another_target_is_not() -> None:
    text = "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May."
    answer = "Natalia sold 48/2 = 24 clips in May, and altogether 48+24 = 72 clips in April and May."
    held_out = [example(text, answer)]
    changed = example(text.replace("April", "March"), answer)
    other_target = example(text, "She sold many clips; how many is a question that we leave open for the reader here.")
    kept = drop_resembling([changed, other_target], held_out, threshold=0.8)
    assert kept.examples == [other_target]
    assert (kept.exact, kept.near) == (0, 1)


def test_the_first_of_repeated_rows_stays() -> None:
    first, again, other = make_example("a", "b", "one"), make_example("a", "b", "two"), make_example("A", "b")
    kept = drop_repeated([first, again, other])
    assert kept.examples == [first, other]
    assert kept.exact == 1


@pytest.mark.slow
def test_many_rows_take_seconds() -> None:
    words = [f"word{i}" for i in range(2000)]

    def text(seed: int) -> str:
        return " ".join(words[(seed * 7919 + i * 104729 + seed * i) % len(words)] for i in range(20))

    held_out = [example(text(i)) for i in range(1000)]
    rows = [example(text(i)) for i in range(500, 10_500)]
    start = time.perf_counter()
    kept = drop_resembling(rows, held_out, threshold=0.9)
    assert kept.exact >= 500
    # Comparing each of the 10 million pairs would take minutes.
    assert time.perf_counter() - start < 60
