"""Translation pairs from the gettext catalogs that Python packages ship inside their wheels."""

from __future__ import annotations

import re
import struct
import zipfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from skd_lib.data.examples import Example, make_example
from skd_lib.errors import SkdError

_CATALOG = re.compile(r"(?:.*/)?(?P<language>[^/]+)/LC_MESSAGES/(?P<domain>[^/]+)\.(?P<kind>po|mo)")


@dataclass
class CatalogPairs:
    """The pairs in one wheel, translation and English original, and the entries that were left out, by reason."""

    examples: list[Example] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)


def read_wheel(wheel: Path, package: str, language: str, min_words: int, max_words: int | None = None) -> CatalogPairs:
    """Read every `*/LANGUAGE/LC_MESSAGES/*.po` (or `.mo`, where there is no `.po`) in a wheel.

    Leaves out untranslated, fuzzy, plural and obsolete entries, copies of the original, entries with fewer than
    `min_words` or more than `max_words` words (separated by white space) on either side, and repeated pairs. The wheel
    is read as a zip file: nothing in it is imported or installed. `package` is the origin of the examples.
    """
    pairs = CatalogPairs()
    seen: set[tuple[str, str]] = set()
    for catalog, entries in _catalogs(wheel, language):
        for entry in entries:
            pair = (entry.msgstr, entry.msgid)
            reason = _unusable(entry, min_words, max_words) or ("duplicate" if pair in seen else "")
            if reason:
                pairs.left_out[reason] += 1
            else:
                seen.add(pair)
                pairs.examples.append(make_example(*pair, origin=f"{package}: {catalog}"))
    return pairs


def _catalogs(wheel: Path, language: str) -> Iterator[tuple[str, Any]]:
    try:
        archive = zipfile.ZipFile(wheel)
    except (OSError, zipfile.BadZipFile) as error:
        raise SkdError(f"not a wheel: {error}", where=str(wheel), hint="delete it, it will be fetched again") from error
    with archive:
        found = [match for name in sorted(archive.namelist()) if (match := _CATALOG.fullmatch(name))]
        # Sorted names put `.po` after `.mo`, so it wins: it marks fuzzy and obsolete entries, `.mo` cannot.
        names = {m.group(0).rpartition(".")[0]: m.group(0) for m in found if m["language"] == language}
        if not names:
            languages = ", ".join(sorted({match["language"] for match in found})) or "none"
            raise SkdError(
                f"no gettext catalog for the language {language!r}",
                where=wheel.name,
                hint=f"languages in this wheel: {languages}",
            )
        for name in names.values():
            yield name, _parse(archive.read(name), f"{wheel.name}, {name}", binary=name.endswith(".mo"))


def _parse(content: bytes, where: str, *, binary: bool) -> Any:
    import polib

    try:
        return polib.mofile(content) if binary else polib.pofile(content.decode("utf-8"))
    except (OSError, UnicodeDecodeError, struct.error) as error:
        raise SkdError(f"cannot read the catalog: {error}", where=where, hint="leave this wheel out") from error


def _unusable(entry: Any, min_words: int, max_words: int | None) -> str:
    """Return why an entry is no translation pair; empty if it is one."""
    if entry.obsolete:
        return "obsolete"
    if getattr(entry, "fuzzy", False):  # entries of a compiled catalog do not say
        return "fuzzy"
    if entry.msgid_plural:
        return "plural"
    if not entry.msgstr.strip():
        return "untranslated"
    if entry.msgstr == entry.msgid:
        return "copy of the original"
    words = (len(entry.msgid.split()), len(entry.msgstr.split()))
    if min(words) < min_words:
        return f"fewer than {min_words} words"
    if max_words is not None and max(words) > max_words:
        return f"more than {max_words} words"
    return ""
