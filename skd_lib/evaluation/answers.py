"""Numeric answers, as GSM8K writes them: a solution, then `#### NUMBER` (Cobbe et al. 2021, arXiv 2110.14168)."""

from __future__ import annotations

import re
from fractions import Fraction

ANSWER_MARK = "####"

_DIGITS = r"[0-9]{1,100}+"
_GROUPED = r"[0-9]{1,3}(?:[,\u00a0\u202f][0-9]{2,3}){0,30}[,\u00a0\u202f][0-9]{3}"
_LEAD = re.compile(r"[\s*\\$€£¥₹+\u2212-]*+")
_NUMBER = re.compile(
    rf"""
    (?P<value> (?:{_GROUPED}|{_DIGITS})(?:\.{_DIGITS})? | \.{_DIGITS})
    (?: [eE](?P<exponent>[-+]?[0-9]{{1,2}})
      | \s*/\s* (?P<over>{_DIGITS})
      | \s+ (?P<part>{_DIGITS})/(?P<whole>{_DIGITS})
    )?
    (?! [.,]?[0-9] | \s*/\s*[0-9] | [eE][-+]?[0-9])    # 1,2345 or 3/4/2024 is no number, nor is half of it one
    """,
    re.VERBOSE,
)


def extract_answer(text: str) -> Fraction | None:
    """The number after the first `####`, on its line; None if there is none.

    The first mark counts, as in GSM8K's own evaluation: what a model writes after its answer is not the answer.
    """
    _, mark, rest = text.partition(ANSWER_MARK)
    return parse_number(rest.split("\n", 1)[0]) if mark else None


def parse_number(text: str) -> Fraction | None:
    """The exact value of the number that `text` begins with; None if it begins with none.

    Before the number may stand a sign, a currency, blanks and Markdown's asterisks. Thousands separators (1,234 and
    1,00,000), decimals, exponents, fractions (3/4) and mixed numbers (1 3/4) are understood. More than 100 digits in
    a row are no number but a model that repeats itself.
    """
    lead = _LEAD.match(text)
    assert lead is not None  # noqa: S101 - it matches the empty string
    minuses = sum(lead[0].count(sign) for sign in "-\u2212")
    match = _NUMBER.match(text, lead.end())
    if match is None or minuses > 1:
        return None
    value = Fraction(re.sub(r"[,\u00a0\u202f]", "", match["value"])) * Fraction(10) ** int(match["exponent"] or 0)
    denominator = int(match["over"] or match["whole"] or 1)
    if denominator == 0:
        return None
    value = value + Fraction(int(match["part"]), denominator) if match["part"] else value / denominator
    return -value if minuses else value
