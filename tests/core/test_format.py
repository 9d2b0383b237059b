"""Numbers, tables and errors as people read them."""

from __future__ import annotations

import pytest
from rich.console import Console

from skd_lib._core.format import TextTable, duration, first_line, markdown_table, percent, plain


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0.0 s"),
        (0.44, "0.4 s"),
        (59.4, "59 s"),
        (59.7, "1 min 00 s"),
        (185.2, "3 min 05 s"),
        (3599.7, "1 h 00 min"),
        (7620.0, "2 h 07 min"),
    ],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.914, "91.4%"), (0.93, "93%"), (0.0312, "3.12%"), (0.0004, "0.04%"), (0.00001, "below 0.01%"), (0.0, "0%")],
)
def test_shares_have_the_digits_that_matter(value: float, text: str) -> None:
    assert percent(value) == text


@pytest.mark.parametrize(("value", "text"), [(0.012345, "0.0123"), (12.345, "12.3"), (1234.5, "1,234")])
def test_plain_numbers(value: float, text: str) -> None:
    assert plain(value) == text


def test_a_markdown_table_holds_any_text() -> None:
    assert markdown_table(["a", "b"], [["x|y", "<b>\\\n"]]) == [
        "| a | b |",
        "| --- | ---: |",
        "| x\\|y | &lt;b>\\\\<br> |",
    ]
    assert markdown_table(["a", "b"], [], numbers=False)[1] == "| --- | --- |"


@pytest.mark.parametrize("variant", ["skd", "supervised_kd"])
def test_the_header_of_a_wide_table_breaks_between_words(variant: str) -> None:
    header = ["variant", "tokens a call", *(f"{kind} tokens" for kind in ("response", "student", "teacher")), "time"]
    rows = [[variant, "1.78", "13.6k", "37.9k", "19.2k", "12 min 05 s"]]
    console = Console(width=80, record=True)
    console.print(TextTable("Costs", header, rows).to_rich())
    shown = console.export_text()
    for word in ("variant", "tokens", "a call", "response", "student", "teacher", "12 min 05 s"):
        assert word in shown
    narrow = TextTable("Drafts", ["variant", "tokens a call"], [[variant, "1.78"]])
    assert [column.header for column in narrow.to_rich().columns] == ["variant", "tokens a call"]
    assert TextTable("None", header, []).to_rich().row_count == 0


def test_the_first_line_of_an_error() -> None:
    assert first_line(ValueError("\nno such file\nmore")) == "no such file"
    assert first_line(ValueError()) == "ValueError"
