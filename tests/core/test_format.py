"""Numbers, tables and errors as people read them."""

from __future__ import annotations

import pytest

from skd_lib._core.format import duration, first_line, markdown_table, percent, plain


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


def test_the_first_line_of_an_error() -> None:
    assert first_line(ValueError("\nno such file\nmore")) == "no such file"
    assert first_line(ValueError()) == "ValueError"
