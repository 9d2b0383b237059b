"""Text that a model or a file brought along, made fit for a page.

Escaping is the template's work. What is left are characters that no markup needs to be harmful: those that turn the
direction of the text around them (CVE-2021-42574), that are invisible, or that no encoding has.
"""

from __future__ import annotations

import re

_SURROGATES = re.compile("[\ud800-\udfff]")
# Control characters but tab and newline; bidirectional controls; invisible ones, except the joiners that scripts and
# emoji are written with (U+200C, U+200D); line and paragraph separators; tags.
_INVISIBLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\U000e0000-\U000e007f]"
)


def visible(text: str) -> str:
    """The text with harmful characters shown instead of obeyed: `␛` for escape, `⟨U+202E⟩` for an override."""
    return _INVISIBLE.sub(_shown, _SURROGATES.sub("\ufffd", text))


def clipped(text: str, length: int) -> str:
    """The text's beginning, and how much was left out."""
    return text if len(text) <= length else f"{text[:length]}… (+{len(text) - length:,} characters)"


def _shown(match: re.Match[str]) -> str:
    code = ord(match[0])
    if code < 0x20:
        return chr(0x2400 + code)
    return "\u2421" if code == 0x7F else f"⟨U+{code:04X}⟩"
