"""Conversion of rows to examples: the columns to read, and the errors of a row, with its place."""

from __future__ import annotations

import json
import math
import reprlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from datetime import date, time
from decimal import Decimal
from typing import Any, NoReturn

from skd_lib._core.terminal import visible
from skd_lib.config import Columns
from skd_lib.config.data import PLACE, columns_of
from skd_lib.data.conversations import read_conversation, read_prompt, read_request
from skd_lib.data.examples import Example, conversation_example, make_example
from skd_lib.errors import SkdError, SkdErrors

MAX_PROBLEMS = 20
_ALIKE = 3
"""First rows: a problem that all of them have is not their own, but a wrong column, say."""
MAX_CHARACTERS = 4_000_000
"""Of one text: about a million tokens, more than models take, which are tokenised in some ten seconds."""
QUICK_CHARACTERS = 100_000_000
"""Of all texts where only the first rows are read."""
HINT_BROKEN = "correct or remove this row"
_NAME_COLUMNS = (
    "name the columns in `data.source.columns` (`skd evaluate`: by --source, --target; "
    "`skd_lib.evaluate`: rename them to `source` and `target`)"
)
Labels = Mapping[str, list[str]]
"""The names of a ClassLabel's values, by column."""
USUAL_COLUMNS = (
    ("source", "target"),
    ("prompt", "completion"),
    ("prompt", "response"),
    ("question", "answer"),
    ("instruction", "output"),
    ("input", "output"),
    ("document", "summary"),
    ("article", "summary"),
    ("text", "summary"),
)
"""Names that the input's and the answer's column usually have."""
ALPACA = Columns(source="{instruction}\n{input}", target="output")
"""Columns of Alpaca's format. `input` is optional: empty, null or not there in a row without it."""
SYSTEM = ("system", "system_prompt")
"""Names of columns that belong before a conversation."""
INPUT_PARTS = (*SYSTEM, "context", "passage", "history")
"""Names of columns that belong to the input, too: a prompt without them is another question."""
CONVERSATIONS = ("messages", "conversations")
"""Names that a column of conversations has: OpenAI's and TRL's, ShareGPT's."""
PROMPT = "prompt"
NAMED_ROWS = 1000
"""First rows whose names say what there is to read: rows of JSON may leave fields out."""


def usual_columns(names: Iterable[str], where: str = "data.source.columns") -> Columns | None:
    """Return the columns to read by the usual names among these; None if there are none.

    `source` and `target` go before conversations, and those before the other pairs: datasets of conversations often
    have the first prompt in a column of its own. `where` is the setting, or the place, that an error names.

    Raises:
        SkdError: the input seems to be in several columns, of which the usual names say one.
    """
    present = set(names)
    pairs = [pair for pair in USUAL_COLUMNS if present.issuperset(pair)]
    if pairs and pairs[0] == USUAL_COLUMNS[0]:
        return Columns()
    for name in CONVERSATIONS:
        if name in present:
            if apart := [system for system in SYSTEM if system in present]:
                what = f"the system message seems to be in a column of its own: {apart[0]}"
                hint = "put it first in each conversation, with the role `system`"
                raise SkdError(what, where=where, hint=f"{hint}; or read without it: `{{messages: {name}}}`")
            return Columns(messages=name)
    if present.issuperset(ALPACA.names):
        found = ALPACA
    elif pairs:
        found = Columns(source=pairs[0][0], target=pairs[0][1])
    elif PROMPT in present:
        found = Columns(source=PROMPT, target=None)
    else:
        return None
    if more := [name for name in INPUT_PARTS if name in present]:
        names = columns_of(found.source)
        alone = "\\n".join(f"{{{name}}}" for name in names) if len(names) > 1 else names[0]
        target = found.target or "null"
        whole = "\\n".join(f"{{{name}}}" for name in [*more, *names])
        raise SkdError(
            f"the input seems to be in several columns: {', '.join([*more, *names])}",
            where=where,
            hint=f'name those to read: `{{source: "{whole}", target: {target}}}`, or without the rest '
            f'`{{source: "{alone}", target: {target}}}`; without this setting rename columns to `source` and `target`',
        )
    return found


class Problems:
    """Collects errors of rows, and stops reading at `MAX_PROBLEMS`."""

    def __init__(self) -> None:
        self._errors: list[SkdError] = []

    def add(self, error: SkdError) -> None:
        """Note an error."""
        self._errors.append(error)
        if len(self._errors) >= MAX_PROBLEMS:
            self.stop(f"reading stopped after {len(self._errors)} problems; there may be more")

    def stop(self, reason: str) -> NoReturn:
        """Raise `SkdErrors` with all that was noted, and the reason why no more was."""
        raise SkdErrors([*self._errors, SkdError(reason)])

    def raise_any(self) -> None:
        """Raise `SkdErrors` if anything was noted."""
        if self._errors:
            raise SkdErrors(self._errors)


def check_rows(
    rows: Iterable[tuple[str, dict[str, Any]]],
    columns: Columns,
    problems: Problems,
    labels: Labels | None = None,
    max_characters: int | None = None,
) -> list[Example]:
    """Turn rows into examples: all columns must be there, and make two texts that are not blank, or a conversation.

    Rows come with their places. Reading stops after `max_characters` in all.
    """
    examples: list[Example] = []
    characters = 0
    first: list[set[tuple[str, str]]] = []
    for where, row in rows:
        errors: list[SkdError] = []
        try:
            example = _example(row, columns, labels or {}, where)
            if examples and (wrong := _differing(example, examples[0], columns)):
                errors = [wrong]
        except SkdError as found:
            errors = found.errors if isinstance(found, SkdErrors) else [found]
        for error in errors:
            problems.add(SkdError(error.what, where=f"{where}, {error.where}", hint=error.hint))
        if len(first) < _ALIKE:
            first.append({(error.where, error.hint) for error in errors if error.hint != HINT_BROKEN})
            if len(first) == _ALIKE and set.intersection(*first):
                problems.stop(f"reading stopped: each of the first {_ALIKE} rows has the same problem")
        if not errors:
            examples.append(example)
            characters += len(example.source) + len(example.target)
            if max_characters is not None and characters >= max_characters:
                break
    return examples


def _example(row: Mapping[str, Any], columns: Columns, labels: Labels, origin: str) -> Example:
    """Return the example of a row."""
    tools = row.get(columns.tools)
    if columns.messages is not None:
        read = read_conversation if columns.answers == "read" else read_request
        talk = read(_field(row, columns.messages), tools, field=columns.messages)
    elif _holds_messages(row.get(columns.source)):
        fields = (columns.source, columns.target or "completion")
        completion = _field(row, columns.target) if columns.target else None
        if columns.target and completion is None:
            raise SkdError("the field is empty: null", where=f"field `{columns.target}`", hint=HINT_BROKEN)
        talk = read_prompt(row[columns.source], completion, tools, fields=fields)
    else:
        texts, errors = [], []
        for column in filter(None, (columns.source, columns.target)):
            try:
                texts.append(_text(row, column, columns, labels))
            except SkdErrors as several:
                errors += several.errors
        if errors:
            raise SkdErrors(errors)
        return make_example(texts[0], texts[1] if columns.target else "", origin)
    for number, message in enumerate(talk.messages, start=1):
        if wrong := _wrong(message["content"]):
            where = f"field `{columns.messages or columns.source}`, message {number}"
            raise SkdError(wrong, where=where, hint=HINT_BROKEN)
    return conversation_example(talk, origin)


def _field(row: Mapping[str, Any], name: str) -> Any:
    if name not in row:
        hint = f"this row has: {listed(row)}; {_NAME_COLUMNS}"
        raise SkdError("the field is missing", where=f"field `{name}`", hint=hint)
    return row[name]


def _holds_messages(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes) and isinstance((*value, None)[0], Mapping)


def _differing(example: Example, first: Example, columns: Columns) -> SkdError | None:
    """Return an error if a row is of another format than the first one."""

    def form(of: Example) -> str:
        kind = "text" if of.conversation is None else "messages"
        return f"{kind} {'with' if of.target else 'without'} an answer"

    if form(example) == form(first):
        return None
    what = f"mixed formats: this row has {form(example)}, the first one {form(first)}"
    return SkdError(what, where=f"field `{columns.messages or columns.source}`", hint="keep one format in a file")


def check_columns(names: Iterable[str], file: str, columns: Columns) -> None:
    """Check once, not for each row, that a table has the columns, and no two of one name."""
    names = list(names)
    repeated = [name for name, count in Counter(names).items() if count > 1 and name.strip()]
    errors = [
        SkdError("several columns have this name", where=f"{file}, field `{name}`", hint="rename all but one")
        for name in repeated
    ]
    hint = f"this file has: {listed(names)}; {_NAME_COLUMNS}"
    missing = [name for name in columns.names if name not in names]
    errors += [SkdError("the column is missing", where=f"{file}, field `{name}`", hint=hint) for name in missing]
    if errors:
        raise SkdErrors(errors)


def listed(names: Iterable[Any]) -> str:
    """Return names of columns on one line, not too long."""
    return _cut(visible(", ".join(_cut(str(name), 60) for name in list(names)[:20])) or "nothing", 400)


def _shown(value: object) -> str:
    """Return a value's type and, of one that holds no text, the value, not too long: no error quotes a text."""
    if value is None:
        return "null"
    kind = type(value).__name__
    return f"{kind} {_cut(_SHORT.repr(value), 40)}" if isinstance(value, _SIMPLE) else kind


def _text(row: Mapping[str, Any], column: str, columns: Columns, labels: Labels) -> str:
    """Return the text of a column, or of a template filled with several."""
    errors, parts = [], {}
    for name in columns_of(column):
        try:
            parts[name] = _part(row, name, columns, labels)
        except SkdError as error:
            errors.append(SkdError(error.what, where=f"field `{name}`", hint=error.hint))
    if errors:
        raise SkdErrors(errors)
    is_template = PLACE.search(column) is not None
    text = PLACE.sub(lambda place: parts[place[1]], column) if is_template else parts[column]
    if is_template and not all(part.strip() for part in parts.values()):
        text = text.strip()  # of the space that stood between an empty part and the others
    # A template of whose parts none has text says nothing about this row.
    empty = not any(part.strip() for part in parts.values())
    if wrong := "the text is empty" if empty else _wrong(text):
        raise SkdErrors([SkdError(wrong, where=f"field `{column}`", hint=HINT_BROKEN)])
    return text


def _wrong(text: str) -> str:
    if len(text) > MAX_CHARACTERS:
        return f"a text of {len(text):,} characters is too long; at most {MAX_CHARACTERS:,} are read"
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"an invalid character: half a surrogate pair, \\u{ord(text[error.start]):x}, at character {error.start}"
    return ""


def _part(row: Mapping[str, Any], name: str, columns: Columns, labels: Labels) -> str:
    """Return a field as text."""
    if name == "input" and columns.source == ALPACA.source and row.get(name) is None:
        return ""
    value, cast = _field(row, name), columns.cast.get(name)
    if cast == "label_name":
        return _label(value, labels.get(name))
    if isinstance(value, str):
        return value
    if cast == "text":
        return _plain(value)
    what = f"must be text, got {_shown(value)}"
    if value is None or not isinstance(value, _SIMPLE):
        raise SkdError(what, hint=HINT_BROKEN)
    wanted = "label_name" if name in labels else "text"
    raise SkdError(what, hint=f"to read this column as text, add `cast: {{{name}: {wanted}}}` to `columns`")


_SIMPLE = (bool, int, float, Decimal, date, time)
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 80


def _plain(value: Any) -> str:
    """Return a simple value as JSON writes it."""
    if value is None:
        return ""
    if isinstance(value, date | time):
        return value.isoformat()
    if isinstance(value, Decimal) and value.is_finite():
        return f"{value:f}"  # never `0E-10`
    if isinstance(value, bool | int) or (isinstance(value, float) and math.isfinite(value)):
        return json.dumps(value)
    raise SkdError(f"cannot be written as text: {_shown(value)}", hint=HINT_BROKEN)


def _label(value: Any, names: list[str] | None) -> str:
    if names is None:
        hint = "names come from the ClassLabel of a dataset; use `text` to get the values themselves"
        raise SkdError("this column has no label names", hint=hint)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < len(names):
        raise SkdError(
            f"must be the number of a label, 0 to {len(names) - 1}, got {_shown(value)}",
            hint=HINT_BROKEN,
        )
    return names[value]


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 3]}..."
