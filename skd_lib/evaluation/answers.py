"""Answers that can be right or wrong: found in a text, and brought to a form in which equal answers are equal.

GSM8K writes a solution, then `#### NUMBER` (Cobbe et al. 2021, arXiv 2110.14168); MATH puts the answer in `\\boxed{}`
(Hendrycks et al. 2021, arXiv 2103.03874).
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable
from fractions import Fraction

from skd_lib.config import AnswerKind
from skd_lib.evaluation.latex import canonical

Value = Fraction | str
"""An answer's value: exact where it is a number, else LaTeX in canonical form."""

ANSWER_MARK = "####"

_DIGITS = r"[0-9]{1,100}+"
_SEPARATOR = "[,\u00a0\u2009\u202f]"
# By commas and narrow blanks in groups of three, or two as in India; by blanks and underscores in groups of three.
_GROUPED = rf"[0-9]{{1,3}}(?:{_SEPARATOR}[0-9]{{2,3}}){{0,30}}{_SEPARATOR}[0-9]{{3}}"
_SPACED = r"[0-9]{1,3}(?:(?:[ ][0-9]{3}){1,30}|(?:_[0-9]{3}){1,30})(?![0-9]|\s*/)"
_CURRENCY = "$€£¥₹₩₽₺₫₪₱₦₴฿¢"
_CODES = "USD|EUR|GBP|JPY|CNY|INR|CHF|CAD|AUD|NZD|SEK|NOK|DKK|PLN|BRL|MXN|KRW|SGD|HKD|ZAR|US|Rs[.]?"
_LEAD = re.compile(rf"(?:[\s*\\{_CURRENCY}+\u2212:=~≈(\[`_-]|(?:{_CODES})(?![A-Za-z]))*+")


def _number(whole: str) -> str:
    """Return a verbose pattern of a number whose digits before the point are `whole`."""
    return rf"""
    (?P<value> (?:{whole}|{_DIGITS})(?:\.{_DIGITS})? | \.{_DIGITS})
    (?: [eE](?P<exponent>[-+]?[0-9]{{1,2}})
      | \s*/\s* (?P<over>{_DIGITS})
      | \s+ (?P<part>{_DIGITS})/(?P<whole>{_DIGITS})
    )?
    # 1,2345 or 3/4/2024 or 7:30 is no number, nor is half of it one
    (?! [.,:_]?[0-9] | \s*/\s*[0-9] | [eE][-+]?[0-9])
    """


_NUMBER = re.compile(_number(f"{_GROUPED}|{_SPACED}"), re.VERBOSE)
# A sign belongs to a number unless it stands between two things that are subtracted. A blank in a sentence is not
# within a number.
_LAST = re.compile(
    rf"(?<![0-9.,:/])(?:(?<![\w)])[-\u2212])?\\?[{_CURRENCY}]?{_number(_GROUPED)}",
    re.VERBOSE,
)
_BOX = re.compile(r"\\(?:boxed|fbox)(?:\s*(?={)|\s+)")
_BRACES = re.compile(r"\\.|[{}]", re.DOTALL)


def predicted_answer(text: str, kind: AnswerKind) -> Value | None:
    """Return the answer that a model's text gives; None if it gives none in the form that the task asks for.

    Args:
        text: What the model wrote.
        kind: `hash`: the number after the first `####`. `boxed`: what the last `\\boxed{}` holds. `marked`: either, the
            first if there are both. `last_number`: the last number of the text, for models that were taught no form.
    """
    return _PREDICTED[kind](text)


def reference_answer(text: str, kind: AnswerKind) -> Value | None:
    """Return the answer of a reference: marked in one of the ways above, or the whole text; None if it holds none."""
    if ANSWER_MARK in text:
        return extract_answer(text)
    if _BOX.search(text):
        return boxed_answer(text)
    return math_value(text) if kind == "boxed" else parse_number(text)


def extract_answer(text: str) -> Fraction | None:
    """Return the number after the first `####`, on its line, in a box or not; None if there is none.

    The first mark counts, as in GSM8K's own evaluation: what a model writes after its answer is not the answer. Other
    than there, signs and blanks between mark and number (`= 5`, `: 5`, `(5)`) are no reason to call it wrong.
    """
    _, mark, rest = text.partition(ANSWER_MARK)
    line = rest.split("\n", 1)[0].lstrip("#") if mark else ""
    number = parse_number(line)
    boxed = boxed_answer(line) if number is None else None
    return boxed if isinstance(boxed, Fraction) else number


def boxed_answer(text: str) -> Value | None:
    """Return the content of the last `\\boxed{}` or `\\fbox{}`; None if there is none or it is open.

    The last one counts, as in MATH's own evaluation: earlier ones hold intermediate results. `\\boxed 7` holds what is
    left of its formula.
    """
    box = _last(_BOX, text)
    if box is None:
        return None
    if not text.startswith("{", box.end()):
        return math_value(re.split(r"[$\n]", text[box.end() :], maxsplit=1)[0])
    depth = 0
    for brace in _BRACES.finditer(text, box.end()):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return math_value(text[box.end() + 1 : brace.start()])
    return None


def math_value(latex: str) -> Value | None:
    """Return the value of a mathematical answer: a fraction if it is a number, else canonical LaTeX; None if empty."""
    text = canonical(latex)
    minus, rest = (True, text[1:]) if text.startswith("-") else (False, text)
    match = _NUMBER.fullmatch(rest)
    value = _value(match) if match else None
    if value is None:
        return text or None
    return -value if minus else value


def last_number(text: str) -> Fraction | None:
    """Return the last number of a text; None if there is none."""
    match = _last(_LAST, text)
    value = _value(match) if match else None
    if match is None or value is None:
        return None
    return -value if match[0][0] in "-\u2212" else value


def parse_number(text: str) -> Fraction | None:
    """Return the exact value of the number that `text` begins with; None if it begins with none.

    Before the number may stand a sign, a currency, blanks, `=`, `:`, brackets and Markdown's asterisks. Thousands
    separators (1,234, 1 234, 1_234 and 1,00,000), decimals, exponents, fractions (3/4) and mixed numbers (1 3/4) are
    understood. More than 100 digits in a row are no number but a model that repeats itself.
    """
    lead = _LEAD.match(text)
    assert lead is not None  # noqa: S101 - it matches the empty string
    minuses = sum(lead[0].count(sign) for sign in "-\u2212")
    match = _NUMBER.match(text, lead.end())
    value = _value(match) if match and minuses <= 1 else None
    return -value if value is not None and minuses else value


def _last(pattern: re.Pattern[str], text: str) -> re.Match[str] | None:
    return next(iter(deque(pattern.finditer(text), maxlen=1)), None)


def _value(match: re.Match[str]) -> Fraction | None:
    value = Fraction(re.sub(r"[,_\s]", "", match["value"])) * Fraction(10) ** int(match["exponent"] or 0)
    denominator = int(match["over"] or match["whole"] or 1)
    if denominator == 0:
        return None
    return value + Fraction(int(match["part"]), denominator) if match["part"] else value / denominator


def _marked(text: str) -> Value | None:
    return extract_answer(text) if ANSWER_MARK in text else boxed_answer(text)


_PREDICTED: dict[AnswerKind, Callable[[str], Value | None]] = {
    "hash": extract_answer,
    "boxed": boxed_answer,
    "marked": _marked,
    "last_number": last_number,
}
