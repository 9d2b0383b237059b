from __future__ import annotations

import json
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skd_lib.config import AnswerKind
from skd_lib.evaluation.answers import extract_answer, parse_number, predicted_answer, reference_answer


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
        ("##### 42", 42),
        ("###### 42", 42),
        ("#### 10 000", 10000),
        ("#### 10 000 / 2", None),
        ("#### 10 000/2", None),
        ("#### 10 500/2", None),
        ("#### 2 4/2", 4),
        ("#### 10 3/4", Fraction(43, 4)),
        ("#### 1 234 567.5 in all", Fraction(2469135, 2)),
        ("#### 1\u2009234", 1234),
        ("#### 1_000", 1000),
        ("#### 1_000_000", 1000000),
        ("#### 3 5 apples", 3),
        ("#### 1 300/400", Fraction(7, 4)),
        ("#### = 3.0", 3),
        ("#### =-3", -3),
        ("#### (5)", 5),
        ("#### (-5)", -5),
        ("#### [5]", 5),
        ("####: 5", 5),
        ("####:$5", 5),
        ("#### : -5", -5),
        ("#### ~5", 5),
        ("#### \u2248 5", 5),
        ("#### `5`", 5),
        ("#### USD 5", 5),
        ("#### US$5", 5),
        ("#### -EUR 5.50", Fraction(-11, 2)),
        ("#### Rs. 500", 500),
        ("#### ₩1,000", 1000),
        ("#### 5 USD", 5),
        ("#### \\boxed{5}", 5),
        ("#### $\\boxed{1,234}$", 1234),
        ("#### \\boxed{\\frac{1}{2}}", Fraction(1, 2)),
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
        "#### USDA 5",
        "#### 1_00",
        "#### \\boxed{x}",
        "#### \\boxed{}",
        "#\u200b### 5",
        "#### --5",
        "#### -",
        "#### $",
        "#### 1/0",
        "#### 1,2345",
        "#### 12,34",
        "#### 1,23,45",
        "#### 18.5.2",
        "#### 3/4/2024",
        "#### 7:30",
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
    "text",
    [
        "#### " + "1," * 100_000,
        "#### " + "9" * 200_000,
        "#### " + "-" * 200_000,
        "#" * 200_000,
        "\\boxed{" * 20_000,
        "\\boxed{" + "{" * 100_000,
        "\\boxed{" + "\\frac" * 20_000 + "}",
        "\\boxed{" + "\\text{" * 250 + " " * 400 + "}",
    ],
)
@pytest.mark.parametrize("kind", ["hash", "boxed", "marked"])
@pytest.mark.timeout(5)
def test_a_model_that_repeats_itself_costs_nothing(text: str, kind: AnswerKind) -> None:
    assert not isinstance(predicted_answer(text, kind), Fraction)


@given(st.text() | st.text(r"\{}fracboxedtext 0123456789/-+.,^$%#"), st.sampled_from(["#### ", "\\boxed{", ""]))
def test_any_text_is_an_answer_or_not(text: str, start: str) -> None:
    kinds: list[AnswerKind] = ["hash", "boxed", "marked", "last_number"]
    for kind in kinds:
        value = predicted_answer(start + text, kind)
        assert value is None or isinstance(value, Fraction | str)


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


BOXED = [
    (r"\boxed{5}", 5),
    (r"first \boxed{4}, finally $\boxed{5}$.", 5),
    (r"\boxed{\frac{1}{2}}", Fraction(1, 2)),
    (r"\boxed{\dfrac12}", Fraction(1, 2)),
    (r"\boxed{\tfrac{1}{2}}", Fraction(1, 2)),
    (r"\boxed{0.5}", Fraction(1, 2)),
    (r"\boxed{.5}", Fraction(1, 2)),
    (r"\boxed{1/2}", Fraction(1, 2)),
    (r"\boxed{-\frac{3}{4}}", Fraction(-3, 4)),
    (r"\boxed{\frac{-3}{4}}", Fraction(-3, 4)),
    (r"\boxed{2\frac{1}{2}}", Fraction(5, 2)),
    (r"\boxed{2\frac{5}{3}}", Fraction(11, 3)),
    (r"\boxed{-2\frac12}", Fraction(-5, 2)),
    (r"\boxed{1{,}000}", 1000),
    (r"\boxed{11,\! 111,\! 111}", 11111111),
    (r"\boxed{\$1,234.50}", Fraction(2469, 2)),
    (r"\boxed{18\text{ cm}^2}", 18),
    (r"\boxed{18\text{ cm}^{2}}", 18),
    (r"\boxed{5\text{ m}/\text{s}^2}", 5),
    (r"\boxed{5 \text{ apples}.}", 5),
    (r"\boxed{5\text{ or }6}", "5or6"),
    (r"\boxed{\text{m}^2}", "m^2"),
    (r"\boxed{1, 234}", "1, 234"),
    (r"\boxed{1,234}", 1234),
    (r"\boxed{12\,345}", 12345),
    (r"\boxed{10 000}", 10000),
    (r"\boxed{2 3}", "2 3"),
    (r"\boxed{2\ 3}", "2 3"),
    (r"\boxed{23}", 23),
    (r"\boxed{3, 4}", "3,4"),
    (r"\boxed{(1, 234)}", "(1,234)"),
    (r"\boxed{x^{2}}", "x^2"),
    (r"\boxed{x^{10} + a_{1}}", "x^{10}+a_1"),
    (r"\boxed{\frac{1}{-2}}", Fraction(-1, 2)),
    (r"\boxed{-\frac{1}{-2}}", Fraction(1, 2)),
    (r"\boxed{\frac{-1}{-2}}", Fraction(1, 2)),
    (r"\boxed{3\frac{1}{-2}}", r"3\frac{1}{-2}"),
    (r"\boxed{18\mbox{ cm}}", 18),
    (r"\boxed{90^\circ}", 90),
    (r"\boxed{90^{\circ}}", 90),
    (r"\boxed{50\%}", 50),
    (r"\boxed{x = 5}", 5),
    (r"\boxed{ 12. }", 12),
    ("\\boxed{\u22127}", -7),
    (r"\boxed {7}", 7),
    (r"$\boxed 7$", 7),
    (r"\fbox{7}", 7),
    (r"\boxed{\boxed{3}}", 3),
    (r"\boxed{\left(1,\, 2\right)}", "(1,2)"),
    (r"\boxed{\{1, 2\}}", r"\{1,2\}"),
    (r"\boxed{\text{yes}}", "yes"),
    (r"\boxed{\sqrt3}", r"\sqrt{3}"),
    (r"\boxed{\frac{\sqrt{3}}{2}}", r"\frac{\sqrt{3}}{2}"),
    (r"\boxed{\frac{a+1}{b}}", r"\frac{a+1}{b}"),
    (r"\boxed{2x}", "2x"),
    (r"\boxed{3,4}", "3,4"),
    (r"\boxed{\frac{1}{0}}", "1/0"),
    (r"\boxed{<script>}", "<script>"),
    (r"\boxed{5", None),
    (r"\boxed{\frac{1}{2}", None),
    (r"\boxed{}", None),
    ("boxed{5}", None),
    ("5", None),
    ("", None),
]


@pytest.mark.parametrize(("text", "value"), BOXED)
def test_boxed_answers(text: str, value: int | Fraction | str | None) -> None:
    assert predicted_answer(text, "boxed") == value


@pytest.mark.parametrize(
    "matrix",
    [
        r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}",
        r"\begin{pmatrix}1\\2\end{pmatrix}",
        r"\begin{pmatrix} 1 \\[1ex] 2 \end{pmatrix}",
        r"\begin{pmatrix} 1 \\ [-0.5 em] 2 \end{pmatrix}",
        "\\begin{pmatrix} 1 \\\\\n 2 \\end{pmatrix}",
        r"\begin{pmatrix} 1 \\ 2 \\ \end{pmatrix}",
        r"\begin{pmatrix} 1 \\\ 2 \end{pmatrix}",
    ],
)
def test_rows_of_a_matrix_stay_apart(matrix: str) -> None:
    assert predicted_answer(rf"\boxed{{{matrix}}}", "boxed") == r"\begin{pmatrix}1\\2\end{pmatrix}"
    two = predicted_answer(r"\boxed{\begin{pmatrix} 1 & 2 \\ 3 & \frac{1}{2} \end{pmatrix}}", "boxed")
    assert two == r"\begin{pmatrix}1&2\\3&1/2\end{pmatrix}"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("12 300 gram bags", 300),
        ("10-5=5", 5),
        ("so 8 apples, and $1,234.50.", Fraction(2469, 2)),
        ("it is -5", -5),
        ("-$5 in total", -5),
        ("\u22125", -5),
        ("5 - 3", 3),
        ("x-3", 3),
        ("pages 2-3", 3),
        ("1/2 of it", Fraction(1, 2)),
        ("18\n36/2", 18),
        ("at 7:30", None),
        ("v1.2.3", None),
        ("none", None),
        ("", None),
    ],
)
def test_last_numbers(text: str, value: int | Fraction | None) -> None:
    assert predicted_answer(text, "last_number") == value


def test_marked_answers_are_those_of_either_form() -> None:
    assert predicted_answer("#### 5 \\boxed{6}", "marked") == 5
    assert predicted_answer("\\boxed{6}", "marked") == 6
    assert predicted_answer("6", "marked") is None
    assert predicted_answer("\\boxed{6}", "hash") is None


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [
        ("steps #### 7", "boxed", 7),
        ("steps \\boxed{7}", "hash", 7),
        ("9 (apples)", "marked", 9),
        ("145.0", "marked", 145),
        ("\\frac{1}{2}", "boxed", Fraction(1, 2)),
        ("7:30", "marked", None),
        ("None", "marked", None),
        ("yes", "boxed", "yes"),
    ],
)
def test_references(text: str, kind: AnswerKind, value: Fraction | str | None) -> None:
    assert reference_answer(text, kind) == value
