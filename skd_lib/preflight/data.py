"""Checks of the data: rows, splits, lengths against the limits, and the optimiser steps they make."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from skd_lib.config import HeldOutFiles, HubSource, MultinodeConfig, RunConfig, TaskConfig, TrainingConfig
from skd_lib.distillation.methods import METHODS
from skd_lib.errors import SkdError
from skd_lib.preflight.checks import Checks, distinct
from skd_lib.preflight.models import Model, check_cuts, check_positions, check_reach
from skd_lib.preflight.templates import check_rendered_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from skd_lib.data.examples import Example
    from skd_lib.data.splits import Splits

MAX_ROWS = 200_000
"""Rows of each data file that are checked; `prepare_data` checks all."""
MAX_HUB_ROWS = 1_000
MAX_TOKENIZED = 200
NEAR_CHARACTERS = 500_000
"""Of each split, in which near duplicates are looked for: a second or two."""
_MAX_TOKENIZED_CHARACTERS = 1_000_000
_CHARACTERS_PER_TOKEN = 16  # more than a token has on average in any text of people


def check_data(checks: Checks, config: RunConfig, models: list[Model], runs: Sequence[RunConfig]) -> str:
    """Look at rows, splits, lengths and training schedules; the data's fingerprint, empty if it cannot be read."""
    from skd_lib.data import sources
    from skd_lib.data.manifest import data_fingerprint
    from skd_lib.data.splits import divide

    max_rows = MAX_HUB_ROWS if isinstance(config.data.source, HubSource) else MAX_ROWS
    source = checks.attempt("data", lambda: sources.load(config.data.source, max_rows=max_rows))
    held_out = _held_out(checks, config)
    if source is None:
        return ""

    def look() -> Splits:
        return divide(source, config.data, config.seed, held_out, NEAR_CHARACTERS)

    splits = checks.attempt("data", look)
    if splits is None:
        return ""
    some = any(len(rows) >= max_rows for rows in (source.train, source.validation or (), source.test or ()))
    left = _rows(checks, splits, f" (of the first {max_rows:,} rows of each split or file only)" if some else "")
    if models:
        _special_tokens(checks, models[-1].tokenizer, splits)
    for student in models[1:] if models and models[0].role == "teacher" else ():
        check_cuts(checks, models[0], student, splits.train_student)
    for model in models:
        rows = splits.train_teacher if model.role == "teacher" else splits.train_student
        check_reach(checks, model, config.task, [*rows, *splits.validation, *splits.test])
        for test_set in config.data.held_out:
            check_reach(checks, model, test_set.task, held_out.get(test_set.name, []))
    if models and models[-1].answer_end is not None:
        _lengths(checks, config, models[-1].tokenizer, models[-1].answer_end, splits)
        for run in distinct(runs, lambda run: (run.student, run.student_init, run.distill)):
            teacher_and_student = [
                model for model in models if model.role == "teacher" or model.reference == run.student
            ]
            check_positions(checks, run, teacher_and_student, splits.train_student, splits.test)
    if left:
        _schedules(checks, config, left, runs)
    return checks.attempt("data", lambda: data_fingerprint(config.data)) or ""


def _rows(checks: Checks, splits: Splits, seen: str) -> int:
    """What each split loses; how many rows train has left."""
    from skd_lib.data.splits import RUN_SPLITS, complaints

    left = {name: max(0, splits.losses[name].rows - splits.losses[name].lost) for name in RUN_SPLITS}
    checks.add("data", "ok", f"rows: {', '.join(f'{name} {count}' for name, count in left.items())}{seen}")
    complained = {name: (level, error) for name, level, error in complaints(splits.losses)}
    for name, loss in splits.losses.items():
        if name in complained:
            level, error = complained[name]
            checks.add(f"{name} left out", level, error.what, where=error.where, hint=error.hint)
        elif loss.lost or loss.looked_at is not None:
            checks.add(f"{name} left out", "ok", str(loss))
    return left["train"]


def _held_out(checks: Checks, config: RunConfig) -> dict[str, list[Example]]:
    """The further test sets: a run goes on without those that cannot be read."""
    from skd_lib.data.sources import load_held_out

    found = {}
    for held_out in config.data.held_out:
        name = f"held-out {held_out.name}"
        limit = MAX_ROWS if isinstance(held_out.source, HeldOutFiles) else MAX_HUB_ROWS
        try:
            found[held_out.name] = load_held_out(held_out, max_rows=limit)
        except SkdError as error:
            hint = "correct it; otherwise the run goes on and reports this set as missing"
            checks.add(name, "warning", error.brief, hint=hint)
        else:
            rows = len(found[held_out.name])
            checks.add(name, "ok", f"{rows} rows{' (the first rows only)' if rows >= limit else ''}")
    return found


def _special_tokens(checks: Checks, tokenizer: PreTrainedTokenizerBase, splits: Splits) -> None:
    """Inputs in which a special token stands as text: the tokenizer takes it for the token, as everywhere else."""
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    tokens = sorted({str(token) for token in (*tokenizer.all_special_tokens, *added) if str(token).strip()})
    if not tokens:
        return
    # The longest first, so that each is counted as itself.
    pattern = re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))))
    rows = [*max(splits.train_teacher, splits.train_student, key=len), *splits.validation, *splits.test]
    found = [set(pattern.findall(row.source)) for row in rows]
    counts = Counter(token for tokens in found for token in tokens)
    if counts:
        named = ", ".join(f"{token} in {count}" for token, count in counts.most_common(5))
        checks.add(
            "special tokens",
            "warning",
            f"{sum(map(bool, found))} of {len(rows)} inputs hold special tokens of the tokenizer as text: {named}",
            hint="they become the tokens themselves in the prompt, in training as in serving, and can end it early: "
            "remove or spell them in another way in the data if that is not meant",
        )


def _lengths(checks: Checks, config: RunConfig, tokenizer: PreTrainedTokenizerBase, end: int, splits: Splits) -> None:
    """A sample of each split against the limits on prompt and answer."""
    from skd_lib.data.losses import REFUSE_ABOVE
    from skd_lib.data.tokenize import encode

    task = config.task
    for name, rows in (("train", splits.train_student), ("validation", splits.validation), ("test", splits.test)):
        sample = _sample(rows, task)
        if not sample:
            continue
        if not check_rendered_rows(checks, name, tokenizer, task, sample):
            continue
        encoded = [encode(tokenizer, task, example, end) for example in sample]
        prompts = [len(example.prompt_ids) for example in encoded]
        long = sum(length > task.max_prompt_tokens for length in prompts)
        cut = sum(example.response_ids[-1] != end for example in encoded)
        hints = [
            *(["raise task.max_prompt_tokens: examples with longer prompts are left out"] if long else []),
            *(["raise task.max_new_tokens: longer answers are cut"] if cut else []),
        ]
        checks.add(
            f"{name} lengths",
            "error" if long > REFUSE_ABOVE * len(sample) else "warning" if hints else "ok",
            f"of {len(sample)} examples {long} have prompts over {task.max_prompt_tokens} tokens (longest "
            f"{max(prompts)}), {cut} have answers over {task.max_new_tokens} tokens",
            hint="; ".join(hints),
        )


def _sample(rows: list[Example], task: TaskConfig) -> list[Example]:
    """The first rows, as many as are tokenised in seconds; of a text far over the limits, a piece that is over them."""
    sample: list[Example] = []
    characters, of_the_task = 0, len(task.system_prompt) + len(task.prompt)
    for row in rows[:MAX_TOKENIZED]:
        source = row.source[: _CHARACTERS_PER_TOKEN * task.max_prompt_tokens]
        target = row.target[: _CHARACTERS_PER_TOKEN * task.max_new_tokens]
        sample.append(replace(row, source=source, target=target))
        characters += of_the_task + len(source) + len(target)
        if characters > _MAX_TOKENIZED_CHARACTERS:
            break
    return sample


def _schedules(checks: Checks, config: RunConfig, rows: int, runs: Sequence[RunConfig]) -> None:
    """Whether batches divide, and how many optimiser steps that makes."""
    from skd_lib.training.plan import plan_steps

    trainings: list[tuple[str, TrainingConfig, MultinodeConfig | None, int | None]] = []
    if config.teacher_sft.enabled:
        sft = config.teacher_sft
        trainings.append(("teacher_sft", sft.training, sft.multinode, config.data.teacher_examples))
    tuned = [run for run in runs if run.student_init.trains]
    distilled = distinct(runs, lambda run: (run.distill.training, run.distill.multinode))
    students: list[tuple[str, TrainingConfig, MultinodeConfig | None]] = [
        *(("student_init", run.student_init.training, None) for run in distinct(tuned, lambda run: run.student_init)),
        *(("distill", run.distill.training, run.distill.multinode) for run in distilled),
    ]
    trainings += [(*student, config.data.student_examples) for student in students]
    for step, training, multinode, limit in trainings:
        examples = min(rows, limit or rows)
        try:
            planned = plan_steps(training, examples, processes=multinode.least_processes if multinode else 1)
        except SkdError as error:
            checks.failed(step, error)
        else:
            checks.add(step, "ok", f"{planned.steps} optimiser steps of {training.batch_size} on {examples} examples")
    for run in distinct(runs, lambda run: (run.distill.method, run.distill.teacher_signal)):
        _stored_signal(checks, run, min(rows, config.data.student_examples or rows))


def _stored_signal(checks: Checks, config: RunConfig, examples: int) -> None:
    """How much storage the teacher's signal takes at most."""
    signal = config.distill.teacher_signal
    if signal.mode == "stored" and METHODS[config.distill.method].divergence:
        size = examples * config.task.max_new_tokens * (8 * signal.top_k + 4)
        what = (
            f"top {signal.top_k} tokens of {examples} examples: at most {size / 2**30:.1f} GiB next to the checkpoints"
        )
        checks.add("teacher_signal", "ok", what)
