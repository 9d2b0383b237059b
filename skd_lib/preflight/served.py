"""Checks of a teacher on a server: it is asked a few short questions."""

from __future__ import annotations

from typing import TYPE_CHECKING

from skd_lib.config import RunConfig
from skd_lib.config.models import ServedTeacher
from skd_lib.distillation.methods import METHODS
from skd_lib.preflight.checks import Checks

if TYPE_CHECKING:
    from collections.abc import Sequence

    from skd_lib.preflight.models import Model

RETRIES = 1


def check_served(checks: Checks, served: ServedTeacher, student: Model, runs: Sequence[RunConfig]) -> None:
    """Check that a server has the teacher, with the student's tokens, and gives what the runs ask for.

    Raises:
        SkdError: it does not.
    """
    from skd_lib.evaluation.generate import ending_ids
    from skd_lib.served.teacher import RemoteTeacher

    config = runs[0]
    task, ends = config.task, ending_ids(student.folder, student.tokenizer, config.task)
    teacher = RemoteTeacher(served, student.tokenizer, task, ends, RETRIES)
    prompt, answer, context = task.max_prompt_tokens, task.max_new_tokens, teacher.context
    found = f"{served}: context {context or 'not said'}"
    if context is not None and prompt + answer >= context:
        what = f"max_prompt_tokens {prompt} + max_new_tokens {answer} leave no room for one more token in its {context}"
        hint = f"lower them to {context - 1} together, or start the server with a longer context (--max-model-len)"
        checks.add("teacher", "error", what, where="task", hint=hint)
    found += ", tokens as ids" if teacher.takes_ids else ", tokens as text"
    reads = [run.distill.teacher_signal.top_k for run in runs if METHODS[run.distill.method].uses_divergence]
    if reads:
        ids = list(student.tokenizer("Hello, world")["input_ids"])
        most = min(max(reads), student.size.vocabulary)
        teacher.read(ids[:1], ids[1:], most)
        found += f", log-probabilities of {most} tokens"
    elif "perplexity" in task.metrics and not teacher.reads:
        what = "it gives no log-probabilities along a given text: its row of the report has no perplexity"
        checks.add("teacher", "warning", what, where=str(served))
    checks.add("teacher", "ok", found)
    what = "a server gives no weights: the student is not measured as this teacher's draft"
    checks.add("teacher", "warning", what, hint="`skd specdec` measures it where the weights are")
