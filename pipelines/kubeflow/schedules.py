"""Schedules as Kubeflow wants them."""

from __future__ import annotations

import re
from collections.abc import Sequence

from skd_lib.errors import SkdError

CRON_FIELDS = 6

_CRON = (
    ("second", 0, 59, ()),
    ("minute", 0, 59, ()),
    ("hour", 0, 23, ()),
    ("day of the month", 1, 31, ()),
    ("month", 1, 12, ("JAN", "FEB", "MAR", "APR", "MAY", "JUN", "JUL", "AUG", "SEP", "OCT", "NOV", "DEC")),
    ("day of the week", 0, 6, ("SUN", "MON", "TUE", "WED", "THU", "FRI", "SAT")),
)
"""Of each field its name, its least and greatest value, and names of values."""


def with_seconds(cron: str) -> str:
    """Return a schedule as Kubeflow wants it, with six fields.

    Raises:
        SkdError: it has neither five fields nor six, or one of them is none of a schedule.
    """
    fields = cron.split()
    if len(fields) == CRON_FIELDS - 1:
        fields = ["0", *fields]
    if len(fields) != CRON_FIELDS:
        hint = 'e.g. "0 3 * * *" for three o\'clock every night (UTC)'
        raise SkdError(f"a schedule has 5 fields, or 6 with seconds first, not {len(fields)}", where=cron, hint=hint)
    for text, (name, least, greatest, names) in zip(fields, _CRON, strict=True):
        if not all(_is_range(part, least, greatest, names) for part in text.split(",")):
            hint = f"numbers from {least} to {greatest}, e.g. {least}, {least}-{greatest}, */{greatest // 2}, or *"
            raise SkdError(f"`{text}` is no {name}", where=cron, hint=hint)
    return " ".join(fields)


def described(cron: str) -> str:
    """Return a sentence on when and how a recurring run starts its runs.

    Raises:
        SkdError: see `with_seconds`.
    """
    names = ", ".join(name for name, *_ in _CRON)
    return f"{with_seconds(cron)} ({names}; UTC), one run at a time; one that was missed is not made up for"


def _is_range(text: str, least: int, greatest: int, names: Sequence[str]) -> bool:
    """Whether a part of a field is `*`, a value, or `FIRST-LAST`, each maybe with `/STEP`."""
    span, slash, step = text.partition("/")
    if slash and not (re.fullmatch("[0-9]{1,3}", step) and int(step) > 0):
        return False
    if span in ("*", "?"):
        return True
    ends = [names.index(end.upper()) + least if end.upper() in names else _number(end) for end in span.split("-")]
    return len(ends) <= 2 and all(least <= end <= greatest for end in ends) and ends == sorted(ends)


def _number(text: str) -> int:
    return int(text) if re.fullmatch("[0-9]{1,3}", text) else -1
