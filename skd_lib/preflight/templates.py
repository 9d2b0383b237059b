"""Checks of the chat templates: what they make of questions and answers, made-up ones and those of the data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from skd_lib.config import RunConfig, TaskConfig
from skd_lib.errors import SkdError
from skd_lib.preflight.checks import Checks

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from skd_lib.data.examples import Example


def check_template(checks: Checks, role: str, tokenizer: PreTrainedTokenizerBase, config: RunConfig) -> None:
    """Look at a model's chat template: it must end, and write system message, question and answer as they are.

    Raises:
        SkdError: it does not, for the run's task. A held-out set for which it does not is a warning.
    """
    for note in _notes(tokenizer, config.task):
        hint = "serve the student with prompts that end as in training, or correct the template"
        checks.add(role, "warning", note, where=str(tokenizer.name_or_path), hint=hint)
    for held_out in config.data.held_out:
        try:
            _notes(tokenizer, held_out.task)
        except SkdError as error:
            what = f"this set cannot be scored with the {role}'s chat template: {error.brief}"
            checks.add(f"held-out {held_out.name}", "warning", what, where="data.held_out", hint=error.hint)


def check_rendered_rows(
    checks: Checks, split: str, tokenizer: PreTrainedTokenizerBase, task: TaskConfig, examples: Sequence[Example]
) -> bool:
    """Look for examples whose question or answer the chat template writes otherwise than they are.

    Returns:
        Whether the template takes them all; the first that it refuses is an error.
    """
    from skd_lib.data.chat import chat_layout

    if not task.chat_template:
        return True
    layout = chat_layout(tokenizer, task)
    found: dict[str, list[Example]] = {}
    for example in examples:
        try:
            what = layout.departure(task, example.source, example.target)
        except SkdError as error:
            where = example.origin or f"example {example.id}"
            checks.add(f"{split} rows", "error", error.what, where=where, hint=error.hint)
            return False
        if what:
            found.setdefault(what, []).append(example)
    for what, rows in found.items():
        checks.add(
            f"{split} rows",
            "error" if what == "question" else "warning",
            f"the chat template changes the {what} of {len(rows)} of {len(examples)} rows",
            where=rows[0].origin or f"example {rows[0].id}",
            hint="remove what the template acts on from these texts (e.g. `</think>`), or correct the template",
        )
    return True


def _notes(tokenizer: PreTrainedTokenizerBase, task: TaskConfig) -> tuple[str, ...]:
    """What there is to say of the template; it is tried in another process first, since it may never end."""
    from skd_lib.data.chat import chat_layout, check_rendering

    if not task.chat_template:
        return ()
    check_rendering(tokenizer, task)
    return chat_layout(tokenizer, task).notes
