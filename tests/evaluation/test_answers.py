from __future__ import annotations

import json
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skd_lib.evaluation.answers import extract_answer, parse_number


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("So she has 18.\n#### 18", 18),
        ("####18", 18),
        ("####   18  ", 18),
        ("#### 18.", 18),
        ("#### 18.00", 18),
        ("#### 0018", 18),
        ("#### 1,234,567", 1234567),
        ("#### 1,234.5", Fraction(2469, 2)),
        ("#### 1,00,000", 100000),
        ("#### 1\u202f234", 1234),
        ("#### 18, because 3 x 6 = 18", 18),
        ("#### -5", -5),
        ("#### \u22125", -5),
        ("#### +5", 5),
        ("#### $18", 18),
        ("#### \\$18", 18),
        ("#### -$18", -18),
        ("#### $-18", -18),
        ("#### € 18.50", Fraction(37, 2)),
        ("#### ₹1,00,000", 100000),
        ("#### **18**", 18),
        ("#### 18 dollars", 18),
        ("#### 18%", 18),
        ("#### .5", Fraction(1, 2)),
        ("#### -.5", Fraction(-1, 2)),
        ("#### 1/2", Fraction(1, 2)),
        ("#### -3 / 4", Fraction(-3, 4)),
        ("#### 1 3/4 cups", Fraction(7, 4)),
        ("#### 1.5e3", 1500),
        ("#### 5eggs", 5),
        ("#### 60 miles/hour", 60),
        ("#### 60/hour", 60),
        ("#### 18\n#### 20", 18),
        ("#### 18\nQuestion: what about 20?\n#### 20", 18),
        ("#### 18 #### 20", 18),
    ],
)
def test_answers(text: str, value: int | Fraction) -> None:
    assert extract_answer(text) == value


@pytest.mark.parametrize(
    "text",
    [
        "",
        "18",
        "The answer is 18.",
        "### 18",
        "# # # # 18",
        "####",
        "#### ",
        "####\n18",  # the model ended its line without an answer
        "#### eighteen",
        "#### The answer is 18",
        "#### x = 18",
        "#### --5",
        "#### -",
        "#### $",
        "#### 1/0",
        "#### 1,2345",
        "#### 12,34",
        "#### 1,23,45",
        "#### 18.5.2",
        "#### 3/4/2024",
        "#### 1e999",
        "#### ٣",
        "#### ¹",
        "#### 1" + "0" * 200,
        "#### \ud800",
        "#### nan",
        "#### inf",
    ],
)
def test_no_answer(text: str) -> None:
    assert extract_answer(text) is None


@pytest.mark.parametrize(
    "text", ["#### " + "1," * 100_000, "#### " + "9" * 200_000, "#### " + "-" * 200_000, "#" * 200_000]
)
@pytest.mark.timeout(5)
def test_a_model_that_repeats_itself_costs_nothing(text: str) -> None:
    assert extract_answer(text) is None


@given(st.text())
def test_any_text_is_an_answer_or_not(text: str) -> None:
    value = extract_answer(f"#### {text}")
    assert value is None or isinstance(value, Fraction)


@given(st.integers(-(10**15), 10**15), st.integers(0, 3))
def test_however_a_number_is_written_it_is_that_number(number: int, decimals: int) -> None:
    value = Fraction(number, 10**decimals)
    sign = "-" if number < 0 else ""
    whole, part = divmod(abs(number), 10**decimals)
    rest = f".{part:0{decimals}}" if decimals else ""
    for written in (
        f"{sign}{whole}{rest}",
        f"{sign}{whole:,}{rest}",
        f"{sign}${whole:,}{rest}",
        f"${sign}{whole:,}{rest} each",
    ):
        assert parse_number(written) == value, written
    assert parse_number(str(value)) == value


GSM8K_ROWS = [
    '{"answer": "He makes 5*2=<<5*2=10>>10\\n#### 10"}',
    '{"answer": "The total is $<<1000*2.5=2500>>2,500.\\n#### 2,500"}',
    '{"answer": "He lost 3-8=<<3-8=-5>>-5\\n#### -5"}',
]


def test_gsm8ks_own_notation() -> None:
    assert [extract_answer(json.loads(row)["answer"]) for row in GSM8K_ROWS] == [10, 2500, -5]
