"""One spelling for mathematical answers that mean the same.

The rules are those of MATH's own evaluation (Hendrycks et al. 2021, arXiv 2103.03874, `math_equivalence.py`), with
fractions of whole numbers written as `1/2`, which the reader of numbers understands.
"""

from __future__ import annotations

import re

MAX_LENGTH = 2000
"""Longer answers are compared as they are: a model that repeats itself has no answer worth rewriting."""

_GROUP = re.compile(r",\s*\\!\s*")
_ROW = re.compile(r"(\\\\)\s*(\\end\s*{)?")
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
