"""Rendering of conversations by a chat template, first in a child process with limits on time and memory.

A chat template is a program that comes with a model: it may raise anything, or never end. Run as a module, this file is
the child process; so it imports no more than rendering needs.
"""

from __future__ import annotations

import datetime
import json
import subprocess
import sys
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from skd_lib.errors import SkdError

Message = dict[str, Any]

MAX_SECONDS = 1.0
"""Processor time for rendering the conversations of one try; templates take milliseconds."""
_MAX_WAIT = 60
_MAX_BYTES = 4 * 2**30
MAX_CHARACTERS = 1_000_000
"""A longer text of a conversation of two short messages is no prompt."""


class Template(NamedTuple):
    """A chat template in Jinja, and the tokenizer's special tokens by name, as JSON."""

    source: str
    variables: str


def render(
    template: Template,
    messages: Sequence[Message],
    *,
    tools: Sequence[Any] = (),
    add_generation_prompt: bool = False,
    date: str = "",
) -> str:
    """Render a conversation, for which `date` (YYYY-MM-DD; empty: today) is the present day."""
    from transformers.utils.chat_template_utils import _compile_jinja_template, render_jinja_template

    now = datetime.datetime.fromisoformat(date) if date else datetime.datetime.now()
    try:
        # The clock cannot be handed over as a variable: transformers lets only plain data into a template.
        _compile_jinja_template(template.source).globals["strftime_now"] = now.strftime
        texts, _ = render_jinja_template(
            [list(messages)],
            tools=list(tools) or None,
            chat_template=template.source,
            add_generation_prompt=add_generation_prompt,
            **json.loads(template.variables),
        )
    except Exception as error:  # a template may do anything that an expression of Python may do
        raise _failure(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}", messages) from error
    return str(texts[0])


@lru_cache(maxsize=64)
def try_rendering(template: Template, conversation: str, date: str = "") -> SkdError | None:
    """Render a conversation (messages as JSON) in a child process, with and without a generation prompt.

    Returns:
        An error if the template takes more than `MAX_SECONDS`, fills the memory or writes more than `MAX_CHARACTERS`;
        None if it ends, also with an exception, which `render` raises as well.
    """
    request = json.dumps([template, json.loads(conversation), date])
    try:
        child = subprocess.run(
            [sys.executable, "-m", __name__], input=request, capture_output=True, text=True, timeout=_MAX_WAIT
        )
    except subprocess.TimeoutExpired:
        return _endless()
    if child.returncode < 0:  # killed when its time was over
        return _endless()
    if child.returncode:
        last = (child.stderr.strip().splitlines() or ["no reason is given"])[-1]
        return SkdError(f"the chat template cannot be tried: {last}")
    written = int(child.stdout.split()[-1])
    if written > MAX_CHARACTERS:
        what = f"the chat template writes {written:,} characters for a conversation of two short messages"
        return SkdError(what, hint=_HINT)
    return None


_HINT = "correct the template (chat_template.jinja or tokenizer_config.json), or set `task.chat_template: false`"


def _endless() -> SkdError:
    return SkdError(f"the chat template does not end: given up after {MAX_SECONDS:g} s", hint=_HINT)


def _failure(what: str, messages: Sequence[Message]) -> SkdError:
    system = messages[0]["role"] == "system"
    hint = f"leave `task.system_prompt` out if the model has no system role; else {_HINT}" if system else _HINT
    return SkdError(f"the chat template refuses the messages: {what}", hint=hint)


def _limit() -> None:
    """Limit this process to `MAX_SECONDS` from now on, after which it is killed, and to a few gigabytes."""
    import resource
    import signal

    signal.setitimer(signal.ITIMER_PROF, MAX_SECONDS)
    if sys.platform == "linux":  # elsewhere the address space cannot be limited
        resource.setrlimit(resource.RLIMIT_AS, (_MAX_BYTES, _MAX_BYTES))


def _child() -> None:
    from transformers.utils import chat_template_utils  # noqa: F401 - before the limits, which are for the template

    source, messages, date = json.load(sys.stdin)
    _limit()
    written = 0
    for shown, opened in ((messages, False), (messages[:-1], True)):
        try:
            written = max(written, len(render(Template(*source), shown, add_generation_prompt=opened, date=date)))
        except SkdError as error:
            if isinstance(error.__cause__, MemoryError):
                written = MAX_CHARACTERS + 1
    sys.stdout.write(str(written))


if __name__ == "__main__":
    _child()
