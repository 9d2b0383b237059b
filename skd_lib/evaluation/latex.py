"""One spelling for mathematical answers that mean the same.

The rules are those of MATH's own evaluation (Hendrycks et al. 2021, arXiv 2103.03874, `math_equivalence.py`), with
fractions of whole numbers written as `1/2`, which the reader of numbers understands.
"""

from __future__ import annotations

import re

MAX_LENGTH = 2000
"""Longer answers are compared as they are: a model that repeats itself has no answer worth rewriting."""

_INVISIBLE = re.compile(r"\\[!,;:> ]|\\(?:left|right|displaystyle|limits|quad|qquad)(?![a-zA-Z])|~")
_UNIT = re.compile(r"\\(?:text|mbox|textrm|mathrm)\s*{[^{}]*}\s*$")
_WORDS = re.compile(r"\\(?:text|mbox|textrm|textbf|mathrm|mathbf)\s*{([^{}]*)}")
_DEGREES = re.compile(r"\^\s*(?:{\s*\\circ\s*}|\\circ)|°")
_MONEY = re.compile(r"\\?\$|\\?%|[€£¥₹]")
_SHORT_FRACTION = re.compile(r"\\frac\s*(?:{([^{}]*)}|(\w))\s*(?:{([^{}]*)}|(\w))")
_SHORT_ROOT = re.compile(r"\\sqrt\s*(\w)")
_NAMED = re.compile(r"[a-zA-Z]\w?\s*=\s*")
_WHOLE = re.compile(r"[0-9]+")
_SPACES = re.compile(r"\s+")


def canonical(latex: str) -> str:
    r"""The answer without what changes its look and not its value.

    Gone are: spacing, `\left` and `\right`, degrees, currencies, per cent signs, a unit in `\text{}` after the value, a
    final full stop, and `x =` before it. `\dfrac`, `\tfrac`, `\frac12` become `\frac{1}{2}`, of whole numbers `1/2`;
    `2\frac{1}{2}` becomes `2 1/2`; `1{,}000` becomes `1,000`; `\text{yes}` becomes `yes`; case is kept.
    """
    if len(latex) > MAX_LENGTH:
        return latex
    text = latex.replace("\u2212", "-").replace("{,}", ",").replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac")
    for pattern in (_INVISIBLE, _DEGREES, _MONEY):
        text = pattern.sub("", text)
    without_unit = _UNIT.sub("", text)
    text = without_unit if without_unit.strip() else text
    text = _WORDS.sub(r"\1", text)
    text = _SHORT_ROOT.sub(r"\\sqrt{\1}", text)
    text = _SHORT_FRACTION.sub(_fraction, text)
    text = text.strip().removesuffix(".").removeprefix("+")
    named = _NAMED.match(text)
    text = text[named.end() :] if named else text
    # Blanks mean something in a mixed number only.
    return text if re.fullmatch(r"-?[0-9]+ [0-9]+/[0-9]+", text) else _SPACES.sub("", text)


def _fraction(match: re.Match[str]) -> str:
    above, below = (match[1] or match[2] or "").strip(), (match[3] or match[4] or "").strip()
    before = match.string[: match.start()].strip()
    # A sign above goes before the whole, where nothing else is.
    if not (_WHOLE.fullmatch(above if before else above.removeprefix("-")) and _WHOLE.fullmatch(below)):
        return f"\\frac{{{above}}}{{{below}}}"
    return f"{' ' if before[-1:].isdigit() else ''}{above}/{below}"
