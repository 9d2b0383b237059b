"""Checks of the data's format: what was found, one example as the model reads it, and what lacks answers."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean
from typing import TYPE_CHECKING

from skd_lib.config import RunConfig, TaskConfig
from skd_lib.data.conversations import is_trained
from skd_lib.data.examples import Example
from skd_lib.data.splits import Splits
from skd_lib.data.tokenize import encode
from skd_lib.distillation.methods import METHODS, samples_every_response
from skd_lib.preflight.checks import Checks

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OPEN, CLOSE = "[[", "]]"
"""Around the tokens that are trained on."""
_PROMPT_ENDS = (300, 500)
_ANSWER_ENDS = (500, 200)


def check_format(checks: Checks, config: RunConfig, runs: Sequence[RunConfig], splits: Splits) -> bool:
    """Report the format of the data, and errors where a step cannot work with it.

    Args:
        checks: Takes the findings.
        config: The run.
        runs: The runs of a comparison, or this one.
        splits: The rows, conversations as a whole.

    Returns:
        Whether the rows can be rendered.
    """
    rows = [*splits.train_student, *splits.validation, *splits.test]
    talks = [row.conversation for row in rows if row.conversation is not None]
    if talks:
        turns = mean(len(talk.turns()) for talk in talks)
        which = "all are trained on" if config.data.assistant_turns == "all" else "the last is trained on"
        tools = sum(bool(talk.tools) for talk in talks)
        noted = f"; {tools} have tools" if tools else ""
        answers = f"{turns:.1f} answers each, {which}" if any(row.target for row in rows) else "without answers"
        checks.add("format", "ok", f"{len(talks)} conversations, {answers}{noted}")
        for name, task in _tasks_of_talks(config, splits):
            if not task.chat_template:
                hint = "set it to true, or give prompts and answers as text"
                what = "the data hold messages, which only a chat template can write"
                checks.add("format", "error", what, where=f"{name}task.chat_template", hint=hint)
                return False
        if config.task.prompt != TaskConfig().prompt:
            hint = "leave `task.prompt` out, and put instructions into the messages or into `task.system_prompt`"
            what = "messages are taken as they are: this template is not put around them"
            checks.add("format", "warning", what, where="task.prompt", hint=hint)
    _check_answers(checks, config, runs, splits)
    return True


def _tasks_of_talks(config: RunConfig, splits: Splits) -> list[tuple[str, TaskConfig]]:
    found = [("", config.task)]
    return found + [
        (f"data.held_out, `{each.name}`, ", each.task)
        for each in config.data.held_out
        if any(row.conversation is not None for row in splits.held_out.get(each.name, ()))
    ]


def _check_answers(checks: Checks, config: RunConfig, runs: Sequence[RunConfig], splits: Splits) -> None:
    """Refuse what needs answers where the data have none."""

    def lacking(rows: Sequence[Example]) -> int:
        return sum(not row.target for row in rows)

    hint = "add answers to the data, or "
    if splits.test and lacking(splits.test) == len(splits.test):
        names = ", ".join(config.task.metrics)
        what = f"test data without answers: {names} will be missing; acceptance and speed as a draft are measured"
        also = "to measure quality too, name a test file or a held-out set with answers"
        checks.add("evaluation", "warning", what, where="task.metrics", hint=also)
        if config.task.wants_comet:
            what = "test data without answers: COMET compares with answers"
            checks.add("evaluation", "error", what, where="task.metrics", hint=f"{hint}leave `comet` out")
        if len(runs) > 1:
            what = "test data without answers: a comparison is one of scores"
            checks.add("evaluation", "error", what, where="data.source", hint=f"{hint}name a test file with answers")
    if config.teacher_sft.enabled and (lacking(splits.train_teacher) or lacking(splits.validation)):
        kind = "training" if lacking(splits.train_teacher) else "validation"
        what = f"{kind} data without answers: the teacher cannot be fine-tuned on them"
        checks.add("teacher_sft", "error", what, where="teacher_sft.enabled", hint=f"{hint}set it to false")
    if not lacking(splits.train_student):
        return
    for run in runs:
        if run.student_init.trains:
            what = "training data without answers: the student cannot be fine-tuned on them"
            where = "student_init.mode"
            checks.add("student_init", "error", what, where=where, hint=f"{hint}start from a student as it is")
        if not samples_every_response(run.distill):
            what = f"training data without answers: `{run.distill.method}` trains on answers of the data"
            sampling = ", ".join(f"`{name}`" for name, entry in METHODS.items() if entry.samples_always)
            found = f"{hint}use {sampling}, or `on_policy` with `on_policy_fraction: 1`"
            checks.add("distill", "error", what, where="distill.method", hint=found)
            return


def show_example(
    checks: Checks, config: RunConfig, tokenizer: PreTrainedTokenizerBase, ends: Sequence[int], splits: Splits
) -> None:
    """Show the first training example as the model reads it, with the tokens that are trained on marked.

    `ends` are the ids at which the model stops, the one that training puts after answers first.
    """
    row = next(iter(splits.train_student), None)
    if row is None or config.data.private:
        return
    encoded = encode(tokenizer, config.task, row, ends[0], ends)
    prompt, answer = (tokenizer.decode(ids) for ids in (encoded.prompt_ids, encoded.response_ids))
    earlier = row.conversation.asked if row.conversation and config.data.assistant_turns == "all" else ()
    shown = _marked(
        prompt, [message["content"] for message in earlier if is_trained(message)], tokenizer.decode(ends[0])
    )
    written = _shortened(answer, *_ANSWER_ENDS) if answer else "a response is sampled here"
    checks.add(
        "example",
        "ok",
        f"{_shortened(shown, *_PROMPT_ENDS)}{OPEN}{written}{CLOSE}",
        where=row.place,
        hint=f"the tokens in {OPEN} {CLOSE} are trained on"
        + (", each answer after what stands before it; methods that sample write their own" if answer else ""),
    )


def _marked(prompt: str, answers: Sequence[str], end: str) -> str:
    """Mark the answers in a prompt, which holds them in this order; what a template leaves out is not marked.

    The token that ends an answer, `end`, belongs to it.
    """
    done, rest = "", prompt
    for answer in filter(None, map(str.strip, answers)):
        before, found, after = rest.partition(answer)
        if found:
            ended = end if after.startswith(end) else ""
            done, rest = f"{done}{before}{OPEN}{found}{ended}{CLOSE}", after.removeprefix(ended)
    return done + rest


def _shortened(text: str, first: int, last: int) -> str:
    left_out = len(text) - first - last
    return text if left_out < 1 else f"{text[:first]} … ({left_out:,} characters) … {text[-last:]}"
