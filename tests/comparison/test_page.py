"""The page of a comparison: its figures, and what they say where something is missing."""

from __future__ import annotations

import csv
import io
import re
from urllib.parse import unquote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skd_lib.comparison.figures import SHOWN, cheapest, figures
from skd_lib.comparison.page import render_page
from skd_lib.comparison.table import Comparison
from skd_lib.evaluation.statistics import t_interval
from skd_lib.report.figure import Figure
from skd_lib.results import Course
from tests.comparison.compared import HOSTILE, compared


def by_title(comparison: Comparison) -> dict[str, Figure]:
    return {figure.title: figure for figure in figures(comparison)}


def rows(figure: Figure) -> list[dict[str, str]]:
    """The figure's CSV file."""
    kind, _, content = figure.file.partition(",")
    assert kind == "data:text/csv;charset=utf-8"
    return list(csv.DictReader(io.StringIO(unquote(content))))


def test_every_figure_is_there_with_its_numbers() -> None:
    found = by_title(compared())
    assert list(found) == [
        *("ChrF against tokens", "ChrF against time"),
        *("Validation loss against tokens (jsd, beta 0.5)", "Validation loss against time (jsd, beta 0.5)"),
        *("Validation loss against tokens (cross-entropy)", "Validation loss against time (cross-entropy)"),
        "Acceptance by position",
    ]
    assert len({figure.name for figure in found.values()}) == len(found)
    assert all(figure.chart and figure.note and not figure.missing for figure in found.values())
    skd = rows(found["ChrF against tokens"])[0]
    assert (skd[""], float(skd["positions through both models"]), float(skd["chrF"])) == ("skd", 9000, 42)
    assert (float(skd["low"]), float(skd["high"])) == pytest.approx(t_interval([40, 44]), rel=1e-4)
    assert float(rows(found["ChrF against time"])[0]["time of training (minutes)"]) == 6
    last = rows(found["Validation loss against tokens (jsd, beta 0.5)"])
    skd_last = next(row for row in last if row["positions through both models"] == "9000")
    assert float(skd_last["skd"]) == pytest.approx(0.55)
    assert (float(skd_last["skd, low"]), float(skd_last["skd, high"])) == pytest.approx(
        t_interval([0.5, 0.6]), rel=1e-4
    )
    # Losses of another objective are on another scale, and so in another chart.
    assert "sft" not in last[0]
    assert rows(found["Acceptance by position"])[1]["skd"] == "0.65"


def test_the_best_for_what_was_spent_is_named() -> None:
    note = by_title(compared())["ChrF against tokens"].note
    assert note == "Dotted: the best score for what was spent, by sft, skd. The teacher has 50.0."


@given(st.lists(st.tuples(st.text(max_size=3), st.integers(0, 5), st.integers(0, 5)), max_size=6))
def test_what_is_cheapest_is_beaten_by_none(points: list[tuple[str, float, float]]) -> None:
    points = [(f"{index}{name}", cost, quality) for index, (name, cost, quality) in enumerate(points)]
    found = cheapest(points)
    for name, cost, quality in points:
        beaten = any(
            other != name and (c < cost or q > quality) and c <= cost and q >= quality for other, c, q in points
        )
        assert not (beaten and name in found)
    assert bool(found) == bool(points)


def test_one_seed_has_the_interval_of_its_examples() -> None:
    found = by_title(compared(seeds=1))
    row = rows(found["Validation loss against time (jsd, beta 0.5)"])[1]
    assert (float(row["skd, low"]), float(row["skd, high"])) == pytest.approx((0.9, 1.1))
    assert "No interval: there is one seed." in found["Acceptance by position"].note


def test_what_is_missing_is_said() -> None:
    found = by_title(compared(course=Course(), acceptance_by_position=(), figures={}))
    reasons = {title: figure.missing for title, figure in found.items()}
    assert reasons == {
        "ChrF against tokens": "No run has both a score and its tokens.",
        "ChrF against time": "No run has both a score and its time.",
        "Validation loss against tokens": "No run has recorded its validations.",
        "Acceptance by position": (
            "The students were not measured as drafts: set `drafts: true` in the comparison's file."
        ),
    }
    old = Course(validation_steps=(0, 1), validation_loss=(2.0, 1.0))
    figure = by_title(compared(course=old, objective=""))["Validation loss against tokens"]
    assert figure.missing == "The runs do not say what had been spent before each validation."


def test_of_many_variants_the_best_are_told_apart() -> None:
    figure = by_title(compared(variants=20))["ChrF against tokens"]
    assert len(re.findall('class="label"', figure.chart)) == SHOWN + 1  # and the teacher
    assert len(rows(figure)) == 20
    assert "the numbers have all" in figure.note
    looks = re.findall(r'<path class="dot ([^"]+)" d="M[-\d.]+ [-\d.]+([^"]+)"/>', figure.chart)
    assert len(set(looks)) == len(looks) == SHOWN


def test_the_page_has_headlines_tables_and_charts_and_escapes_reasons() -> None:
    page = render_page(compared())
    words = " ".join(re.sub(r"<[^>]+>", " ", page[page.index("<body>") :]).split())
    for shown in (
        "42.0 chrF of skd, the best mean 95%: 16.6 to 67.4",
        "50.0 chrF of the teacher",
        "6 runs 1 more failed",
        "on_policy 2 38.5 [32.1, 44.9]",
        "Runs that failed",
        "How to read it",
    ):
        assert shown in words
    assert HOSTILE not in page


def test_one_variant_is_called_so() -> None:
    only = compared().model_copy(update={"variants": compared().variants[:1]})
    note = by_title(only)["ChrF against tokens"].note
    assert note == "There is one variant. The teacher has 50.0."


def test_a_comparison_of_failures_has_a_page() -> None:
    only = compared(scores=None, course=None, draft={}, acceptance_by_position=(), figures={}, reason="lost")
    assert "No run has both a score and its tokens." in render_page(only)
