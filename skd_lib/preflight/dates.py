"""The date that chat templates print, one for a run and all its repetitions.

Templates as those of Llama 3.2 and SmolLM3 print today's date: prompts, and with them training, would be others after
midnight. It is kept beside the checkpoints, so that a run that is started again on another day goes on from them.
"""

from __future__ import annotations

import datetime
import tempfile
from collections.abc import Sequence
from pathlib import Path

from skd_lib import storage
from skd_lib.config import RunConfig
from skd_lib.errors import SkdError
from skd_lib.preflight.checks import Checks
from skd_lib.preflight.models import Model

KEPT_IN = "chat_template_date"
"""File under the root of all checkpoints."""


def check_date(checks: Checks, models: Sequence[Model], config: RunConfig, checkpoint_root: str) -> str:
    """The date that the run's prompts print instead of today's; empty where none is given or printed.

    Args:
        checks: Takes what is found.
        models: The run's models.
        config: The run.
        checkpoint_root: Where the date is kept; empty: it is today's.
    """
    if config.task.date or not any(_prints(model, config) for model in models):
        return config.task.date
    date, lasts = _kept(checkpoint_root), bool(checkpoint_root)
    checks.add(
        "date",
        "warning",
        f"a chat template prints today's date: in all prompts of this run it is {date}"
        + (", also when the run is started again on another day" if lasts else ""),
        where="task.date",
        hint=f"set it, e.g. to {date}: then prompts are the same in "
        + ("every run" if lasts else "every run, and one that is started again on another day goes on where it was"),
    )
    return date


def _prints(model: Model, config: RunConfig) -> bool:
    from skd_lib.data.chat import depends_on_date

    for task in (config.task, *(config.task.with_fields_of(each.task) for each in config.data.held_out)):
        try:
            if depends_on_date(model.tokenizer, task):
                return True
        except SkdError:  # other checks tell what is wrong with the template
            continue
    return False


def _kept(root: str) -> str:
    """The date beside the checkpoints; today's, which is then kept there, where there is none."""
    today = _today()
    if not root:
        return today
    uri = f"{root.rstrip('/')}/{KEPT_IN}"
    try:
        if storage.exists(uri) and (found := _date(storage.read_bytes(uri))):
            return found
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / KEPT_IN
            file.write_text(today, encoding="utf-8")
            storage.upload(file, uri)
        # Of two runs that begin at the same moment both take what the later one wrote.
        return _date(storage.read_bytes(uri)) or today
    except SkdError:  # another check tells that nothing can be kept there
        return today


def _today() -> str:
    return datetime.datetime.now().astimezone().date().isoformat()


def _date(content: bytes) -> str:
    """A date as it was kept; empty if it is none."""
    try:
        return datetime.date.fromisoformat(content.decode("utf-8").strip()).isoformat()
    except ValueError:
        return ""
