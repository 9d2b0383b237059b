"""Personal data taken out of rows as they are read: patterns, and a filter of the user's own.

A filter is a function `(text) -> text`, or None for a row that is to be dropped. A package registers it under a name,

    [project.entry-points."skd.filters"]
    names = "my_package:remove_names"

and is installed where the steps run, in a cluster in an image of one's own. So a configuration, which may come from a
form, names code that is there for this purpose, and cannot bring or choose any other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from skd_lib.config import DataConfig
from skd_lib.config.data import Redaction
from skd_lib.data.examples import Example, conversation_example, make_example
from skd_lib.errors import SkdError

GROUP = "skd.filters"
Clean = Callable[[str], str | None]
_NO_TEXTS = ("role", "type", "id", "tool_call_id")
"""Fields of messages and tools by which a chat template finds its way."""
PATTERN_SECONDS = 10.0
"""For one pattern in one text: some patterns take a time that doubles with each further character."""


class _Dropped(Exception):
    """The filter drops the row."""


class _TooSlow(Exception):
    """A pattern, by its number, takes too long on a text of so many characters."""


def clean_examples(examples: list[Example], config: DataConfig) -> list[Example]:
    """Return the examples as `config.redact` and `config.filter` leave them, without those that they drop.

    Raises:
        SkdError: the filter is not installed, or fails, or a pattern takes too long; the message quotes no text.
    """
    if not config.redact and not config.filter:
        return examples
    patterns = _patterns(config.redact)
    own = _filter(config.filter) if config.filter else None

    def clean(text: str) -> str:
        for number, (pattern, replacement) in enumerate(patterns, 1):
            try:
                text = pattern.sub(replacement, text, timeout=PATTERN_SECONDS)
            except TimeoutError:
                raise _TooSlow(number, len(text)) from None
        kept = own(text) if own is not None else text
        if kept is None:
            raise _Dropped
        if not isinstance(kept, str):
            raise TypeError
        return kept

    found = []
    for example in examples:
        try:
            cleaned = _cleaned(example, clean)
        except _Dropped:
            continue
        except _TooSlow as error:
            number, characters = error.args
            what = f"pattern {number} takes more than {PATTERN_SECONDS:.0f} s on a text of {characters:,} characters"
            hint = "write it without repeats inside repeats, such as `(a+)+`, and with limits, such as `{1,64}`"
            raise SkdError(what, where=f"data.redact, {example.place}", hint=hint) from None
        except Exception as error:
            what = f"the filter `{config.filter}` failed: {type(error).__name__}"
            raise SkdError(
                what, where=example.place, hint="correct it: it takes a text and returns one, or None"
            ) from error
        if cleaned.source.strip() and (cleaned.target.strip() or not example.target):
            found.append(cleaned)
    return found


def _patterns(redact: Sequence[Redaction]) -> list[tuple[Any, str]]:
    """Return the patterns and their replacements for the package `regex`, which reads `re`'s and can be timed."""
    try:
        import regex  # transformers has it, too
    except ImportError as error:
        hint = "install it with the extra `training`"
        raise SkdError("needs the package `regex`, which is not installed", where="data.redact", hint=hint) from error
    # A backslash in a replacement would be a reference to a group.
    return [(regex.compile(each.pattern), each.replacement.replace("\\", r"\\")) for each in redact]


def filter_version(name: str) -> str:
    """Return the package, with its version, that registers a filter here; empty where none does."""
    found = _registered(name)
    return f"{found.dist.name} {found.dist.version}" if found and found.dist else ""


def _cleaned(example: Example, clean: Callable[[str], str]) -> Example:
    if example.conversation is None:
        return make_example(clean(example.source), clean(example.target) if example.target else "", example.origin)
    talk = example.conversation
    messages, tools = (tuple(_texts(each, clean) for each in part) for part in (talk.messages, talk.tools))
    return conversation_example(replace(talk, messages=messages, tools=tools), example.origin)


def _texts(value: Any, clean: Callable[[str], str], *, free: bool = False) -> Any:
    """Clean every text in a message or a tool; of `free` values, a call's arguments, also numbers and fields' names."""
    if isinstance(value, str):
        return clean(value)
    if free and isinstance(value, int | float) and not isinstance(value, bool):
        cleaned = clean(text := str(value))
        return value if cleaned == text else cleaned
    if isinstance(value, Mapping):
        return {
            clean(key) if free else key: each
            if not free and key in _NO_TEXTS and isinstance(each, str)
            else _texts(each, clean, free=free or key == "arguments")
            for key, each in value.items()
        }
    return [_texts(each, clean, free=free) for each in value] if isinstance(value, list | tuple) else value


def _filter(name: str) -> Clean:
    found = _registered(name)
    if found is None:
        known = ", ".join(sorted(entry_points(group=GROUP).names)) or "none"
        hint = f"install it where this runs, in a cluster in the steps' image; registered here: {known}"
        raise SkdError(f"no installed package registers the filter `{name}`", where="data.filter", hint=hint)
    try:
        function: Clean = found.load()
    except (ImportError, AttributeError) as error:
        what = f"the filter `{name}` cannot be loaded: {error}"
        raise SkdError(what, where="data.filter", hint="correct the package that registers it") from error
    return function


def _registered(name: str) -> EntryPoint | None:
    return next(iter(entry_points(group=GROUP, name=name)), None)
