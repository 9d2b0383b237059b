"""Checks of the chat templates: the texts they make of questions and answers, and the date that they print.

Templates as those of Llama 3.2 and SmolLM3 print today's date: prompts, and with them training, would be others after
midnight. So a run's date is kept with its checkpoints, and a run that is started again on another day continues.
"""

from __future__ import annotations

import datetime
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from skd_lib import storage
from skd_lib.config import RunConfig, TaskConfig
from skd_lib.errors import SkdError
from skd_lib.preflight.checks import Checks

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from skd_lib.data.examples import Example
    from skd_lib.preflight.models import Model

DATE_FILE = "chat_template_date"
"""File under the root of all checkpoints."""


def check_template(checks: Checks, role: str, tokenizer: PreTrainedTokenizerBase, config: RunConfig) -> None:
    """Check that a model's chat template ends, and writes system message, question and answer unchanged.

    Raises:
        SkdError: it does not, for the run's task. For a held-out set, that is a warning.
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


def _notes(tokenizer: PreTrainedTokenizerBase, task: TaskConfig) -> tuple[str, ...]:
    """Return remarks on the template, which is tried in another process first, since it may never end."""
    from skd_lib.data.chat import chat_layout, check_rendering

    if not task.chat_template:
        return ()
    check_rendering(tokenizer, task)
    return chat_layout(tokenizer, task).notes


def check_rendered_rows(
    checks: Checks, split: str, tokenizer: PreTrainedTokenizerBase, task: TaskConfig, examples: Sequence[Example]
) -> bool:
    """Find examples of which the chat template changes or leaves out something.

    Returns:
        Whether the template takes all of them; the first that it refuses is an error.
    """
    from skd_lib.data.chat import chat_layout

    if not task.chat_template:
        return True
    layout = chat_layout(tokenizer, task)
    found: dict[str, list[Example]] = {}
    for example in examples:
        try:
            what = layout.departure(task, example.question, example.target)
        except SkdError as error:
            checks.add(f"{split} rows", "error", error.what, where=example.place, hint=error.hint)
            return False
        if what:
            found.setdefault(what, []).append(example)
    for what, rows in found.items():
        hint = "remove what the template acts on from these texts (e.g. `</think>`), or correct the template"
        does = "does not write" if what in ("tools", "thinking") else "changes"
        if what == "tools":
            hint = "use models whose template writes tools, or describe them in the system message"
        if what == "thinking":
            hint = "use models whose template writes thinking: answers are trained on without theirs"
        checks.add(
            f"{split} rows",
            "error" if what == "question" else "warning",
            f"the chat template {does} the {what} of {len(rows)} of {len(examples)} rows",
            where=rows[0].place,
            hint=hint,
        )
    return True


def check_date(checks: Checks, models: Sequence[Model], config: RunConfig, checkpoint_root: str) -> str:
    """Return the date that the run's prompts print instead of today's; empty where none is given or printed.

    Args:
        checks: Takes the findings.
        models: The run's models.
        config: The run.
        checkpoint_root: Folder that keeps the date; empty: it is today's.
    """
    if config.task.date or not any(_prints_date(model, config) for model in models):
        return config.task.date
    date, lasts = _kept_date(checkpoint_root), bool(checkpoint_root)
    checks.add(
        "date",
        "warning",
        f"a chat template prints today's date: in all prompts of this run it is {date}"
        + (", also when the run is started again on another day" if lasts else ""),
        where="task.date",
        hint=f"set it, e.g. to {date}: then prompts are the same in every run"
        + ("" if lasts else ", and one that is started again on another day continues"),
    )
    return date


def _prints_date(model: Model, config: RunConfig) -> bool:
    from skd_lib.data.chat import depends_on_date

    for task in (config.task, *(config.task.with_fields_of(each.task) for each in config.data.held_out)):
        try:
            if depends_on_date(model.tokenizer, task):
                return True
        except SkdError:  # other checks report what is wrong with the template
            continue
    return False


def _kept_date(root: str) -> str:
    """Return the date kept with the checkpoints; where there is none, keep today's there."""
    now = today()
    if not root:
        return now
    uri = f"{root.rstrip('/')}/{DATE_FILE}"
    try:
        if storage.exists(uri) and (found := _parsed(storage.read_bytes(uri))):
            return found
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / DATE_FILE
            file.write_text(now, encoding="utf-8")
            storage.upload(file, uri)
        # Of two runs that begin at the same moment both take what the later one wrote.
        return _parsed(storage.read_bytes(uri)) or now
    except SkdError:  # another check reports that nothing can be kept there
        return now


def today() -> str:
    """Return today's date, as YYYY-MM-DD."""
    return datetime.datetime.now().astimezone().date().isoformat()


def _parsed(content: bytes) -> str:
    """Return the date that a file holds; empty if it holds something else."""
    try:
        return datetime.date.fromisoformat(content.decode("utf-8").strip()).isoformat()
    except ValueError:
        return ""
