"""Answers that can be right or wrong: found in a text, and brought to a form in which equal answers are equal.

GSM8K writes a solution, then `#### NUMBER` (Cobbe et al. 2021, arXiv 2110.14168); MATH puts the answer in `\\boxed{}`
(Hendrycks et al. 2021, arXiv 2103.03874). The rules that give mathematical answers one spelling are those of MATH's own
evaluation (`math_equivalence.py`), with fractions of whole numbers written as `1/2`, which the reader of numbers
understands.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable
from fractions import Fraction

from skd_lib.config import AnswerKind

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
      | [^\S\n]+ (?P<part>{_DIGITS})/(?P<whole>{_DIGITS})
    )?
    # 1,2345 or 3/4/2024 or 7:30 is no number, nor is half of it one, nor 10 of 10 000 / 2
    (?! [.,:_]?[0-9] | (?:[ ][0-9]{{3}})*\s*/\s*[0-9] | [eE][-+]?[0-9])
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

MAX_LENGTH = 2000
"""Longer answers are compared as they are: a model that repeats itself has no answer worth rewriting."""

_GROUP = re.compile(r",\s*\\!\s*")
_ROW = re.compile(r"(\\\\)(?:\s*\[\s*-?[0-9.]+\s*[a-z]{2}\s*\])?\s*(\\end\s*{)?")
_BLANK = re.compile(r"\\[,;:> ]|\\(?:quad|qquad)(?![a-zA-Z])|~")
_INVISIBLE = re.compile(r"\\!|\\(?:left|right|displaystyle|limits)(?![a-zA-Z])")
_UNIT = re.compile(r"(?:[/·]?\s*\\(?:text|mbox|textrm|mathrm)\s*{[^{}]*}\s*(?:\^\s*(?:{\s*-?[0-9]\s*}|[0-9])\s*)?)+$")
_WORDS = re.compile(r"\\(?:text|mbox|textrm|textbf|mathrm|mathbf)\s*{([^{}]*)}")
_DEGREES = re.compile(r"\^\s*(?:{\s*\\circ\s*}|\\circ)|°")
_MONEY = re.compile(r"\\?\$|\\?%|[€£¥₹]")
_SHORT_FRACTION = re.compile(r"\\frac\s*(?:{([^{}]*)}|(\w))\s*(?:{([^{}]*)}|(\w))")
_SHORT_ROOT = re.compile(r"\\sqrt\s*(\w)")
_NAMED = re.compile(r"[a-zA-Z]\w?\s*=\s*")
_WHOLE = re.compile(r"[0-9]+")
_INDEX = re.compile(r"([_^])\s*{\s*(\w)\s*}")
_PLAIN_LIST = re.compile(r"[-0-9.,\s]+")
_SPACES = re.compile(r"\s+")
# Blanks that mean something: between two digits, and in a list of numbers, 1, 234, which are not 1,234.
_BETWEEN_DIGITS = re.compile(r"(?<![0-9])\s+|\s+(?![0-9])")
_IN_LIST = re.compile(r"(?<![0-9])(?<![0-9],)\s+|(?<=,)\s+(?![0-9]{3}(?![0-9]))|\s+(?![0-9])")


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


def canonical(latex: str) -> str:
    r"""Return the answer without what changes its look and not its value.

    Gone are: spacing, `\left` and `\right`, degrees, currencies, per cent signs, a unit in `\text{}` after the value, a
    final full stop, and `x =` before it. `\dfrac`, `\tfrac`, `\frac12` become `\frac{1}{2}`, of whole numbers `1/2`;
    `2\frac{1}{2}` becomes `2 1/2`; `1{,}000` becomes `1,000`; `x^{2}` becomes `x^2`; `\text{yes}` becomes `yes`; case
    is kept, and so are blanks between digits (`2 3` is not `23`) and in a list (`1, 234` is not `1,234`).
    """
    if len(latex) > MAX_LENGTH:
        return latex
    text = latex.replace("\u2212", "-").replace("{,}", ",").replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac")
    # Rows of a matrix first: the second backslash of `\\ ` does not begin a blank.
    rows = [_spaced(row) for row in _ROW.sub(lambda row: row[2] or row[1], _GROUP.sub(",", text)).split("\\\\")]
    text = "\\\\".join(rows).strip().removesuffix(".")
    without_unit = _UNIT.sub("", text)
    text = without_unit if without_unit.strip() else text
    text = _WORDS.sub(r"\1", text)
    text = _SHORT_ROOT.sub(r"\\sqrt{\1}", text)
    text = _SHORT_FRACTION.sub(_fraction, text).strip().removeprefix("--")
    text = text.removesuffix(".").removeprefix("+")
    named = _NAMED.match(text)
    text = text[named.end() :] if named else text
    text = _INDEX.sub(r"\1\2", text)
    meaningless = _IN_LIST if _PLAIN_LIST.fullmatch(text) else _BETWEEN_DIGITS
    return _SPACES.sub(" ", meaningless.sub("", text))


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
    part = match["part"] or ""
    if denominator == 0 or (len(part) == 3 and not 0 < int(part) < denominator):
        return None  # 10 000/2 is no mixed number
    return value + Fraction(int(part), denominator) if part else value / denominator


def _spaced(text: str) -> str:
    """Without commands for space and size, currencies and degrees."""
    for pattern, instead in ((_BLANK, " "), (_INVISIBLE, ""), (_DEGREES, ""), (_MONEY, "")):
        text = pattern.sub(instead, text)
    return text


def _fraction(match: re.Match[str]) -> str:
    above, below = (match[1] or match[2] or "").strip(), (match[3] or match[4] or "").strip()
    before = match.string[: match.start()].strip()
    # Signs above and below go before the whole, where nothing else is but a sign.
    digits = [above.removeprefix("-"), below.removeprefix("-")] if before in ("", "-") else [above, below]
    if not all(_WHOLE.fullmatch(number) for number in digits):
        return f"\\frac{{{above}}}{{{below}}}"
    sign = "-" if [above, below] != digits and above.startswith("-") != below.startswith("-") else ""
    return f"{sign}{' ' if before[-1:].isdigit() else ''}{'/'.join(digits)}"


def _marked(text: str) -> Value | None:
    return extract_answer(text) if ANSWER_MARK in text else boxed_answer(text)


_PREDICTED: dict[AnswerKind, Callable[[str], Value | None]] = {
    "hash": extract_answer,
    "boxed": boxed_answer,
    "marked": _marked,
    "last_number": last_number,
}
