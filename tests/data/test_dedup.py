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


def test_rows_that_differ_by_a_number_are_no_duplicates() -> None:
    form = "Please convert the following order of Miller and Sons, 12 Harbour Road, into SQL. Order number: {}."
    held_out = [example(form.format(number)) for number in ("17", "1,234.50", "3.14", "-5", "2026-11-29")]
    others = [example(form.format(number)) for number in ("18", "1,234.51", "31.4", "5", "2026-11-28", "1 7", "none")]
    kept = drop_resembling(others, held_out, threshold=0.5)
    assert kept.examples == others
    same = [example(form.format(number) + "!") for number in ("17", "1234.50", "3,14", "\u22125", "2026-11-29")]
    kept = drop_resembling(same, held_out, threshold=0.5)
    assert (kept.examples, kept.near) == ([], 5)
    assert kept.pairs == list(zip(same, held_out, strict=True))[:3]


def test_a_quick_look_compares_a_limited_number_of_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    form = "Of all towns of the county {} is said to be the one with the most rain in the year."
    names = [f"{chr(97 + a)}{chr(98 + b)}{chr(99 + a)}{chr(100 + b)}" * 5 for a in range(10) for b in range(10)]
    rows = [example(form.format(name)) for name in names]
    monkeypatch.setattr("skd_lib.data.dedup.QUICK_PAIRS", 100)
    quick = drop_resembling(rows[50:], rows[:50], threshold=0.85, characters=10**9)
    assert quick.compared is not None
    assert 0 < quick.compared < 50
    assert quick.examples == rows[50:]
    assert drop_resembling(rows[50:], rows[:50], threshold=0.85).compared is None


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("7. Buy 12,5 kg, or 1,234,567.25 g", ("7", "12.5", "1234567.25")),
        ("-3 and 3-4 (-5) x=-2 \u22126", ("-3", "3", "4", "-5", "-2", "-6")),
        ("at 10:30, 1/2", ("10", "30", "1", "2")),
        ("no. 007", ("007",)),
        ("none", ()),
    ],
)
def test_numbers_of_a_text(text: str, found: tuple[str, ...]) -> None:
    assert numbers(text) == found


def test_a_quick_look_finds_all_copies_and_says_how_far_it_looked_for_near_ones() -> None:
    rows = [example(f"a text of some length, with the letter {chr(97 + i)} in it") for i in range(20)]
    near = [example(row.source.replace("some", "sone")) for row in rows]
    kept = drop_resembling([*near, *rows], rows, threshold=0.8, characters=300)
    assert kept.exact == 20
    assert kept.compared == 5
    assert 0 < kept.near <= 5
    assert len(kept.examples) == 20 - kept.near
    assert drop_resembling(near, rows, threshold=0.8, characters=10_000).compared is None


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
    start = time.process_time()
    kept = drop_resembling(rows, held_out, threshold=0.9)
    assert kept.exact >= 500
    # Of a CPU, so that a busy machine changes nothing. Comparing each of the 10 million pairs would take minutes.
    assert time.process_time() - start < 60
