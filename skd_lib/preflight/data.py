"""Checks of the data: rows, splits, lengths against the limits, and the optimiser steps they make."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from skd_lib.config import HeldOutFiles, HubSource, MultinodeConfig, RunConfig, TrainingConfig
from skd_lib.errors import SkdError
from skd_lib.methods import METHODS
from skd_lib.preflight.checks import Checks, distinct
from skd_lib.preflight.models import Model
from skd_lib.preflight.templates import check_rendered_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from skd_lib.data.sources import SourceSplits

MAX_ROWS = 200_000
"""Rows of each data file that are checked; `prepare_data` checks all."""
MAX_HUB_ROWS = 1_000
MAX_TOKENIZED = 200


def check_data(checks: Checks, config: RunConfig, models: list[Model], runs: Sequence[RunConfig]) -> str:
    """Look at rows, splits, lengths and training schedules; the data's fingerprint, empty if it cannot be read."""
    from skd_lib.data import sources
    from skd_lib.data.manifest import data_fingerprint
    from skd_lib.data.splits import cut_missing

    max_rows = MAX_HUB_ROWS if isinstance(config.data.source, HubSource) else MAX_ROWS

    def look() -> SourceSplits:
        return cut_missing(sources.load(config.data.source, max_rows=max_rows), config.data, config.seed)

    splits = checks.attempt("data", look)
    if splits is None:
        return ""
    counts = {"train": splits.train, "validation": splits.validation or [], "test": splits.test or []}
    some = any(len(rows) >= max_rows for rows in counts.values())
    rows = ", ".join(f"{name} {len(examples)}" for name, examples in counts.items())
    checks.add(
        "data", "ok", f"rows before near duplicates are dropped: {rows}{' (the first rows only)' if some else ''}"
    )
    if models and models[-1].answer_end is not None:
        _lengths(checks, config, models[-1].tokenizer, models[-1].answer_end, splits)
    _schedules(checks, config, len(splits.train), runs)
    _held_out(checks, config)
    return checks.attempt("data", lambda: data_fingerprint(config.data)) or ""


def _held_out(checks: Checks, config: RunConfig) -> None:
    """The further test sets: a run goes on without those that cannot be read."""
    from skd_lib.data.sources import load_held_out

    for held_out in config.data.held_out:
        name = f"held-out {held_out.name}"
        limit = MAX_ROWS if isinstance(held_out.source, HeldOutFiles) else MAX_HUB_ROWS
        try:
            rows = len(load_held_out(held_out, max_rows=limit))
        except SkdError as error:
            hint = "mend it, or the run goes on and reports this set as missing"
            checks.add(name, "warning", error.brief, hint=hint)
        else:
            checks.add(name, "ok", f"{rows} rows{' (the first rows only)' if rows >= limit else ''}")


def _lengths(
    checks: Checks, config: RunConfig, tokenizer: PreTrainedTokenizerBase, end: int, splits: SourceSplits
) -> None:
    """A sample of each split against the limits on prompt and answer."""
    from skd_lib.data.tokenize import encode

    task = config.task
    for name in ("train", "validation", "test"):
        sample = (getattr(splits, name) or [])[:MAX_TOKENIZED]
        check_rendered_rows(checks, name, tokenizer, task, sample)
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
            "error" if long == len(sample) else "warning" if hints else "ok",
            f"of {len(sample)} examples {long} have prompts over {task.max_prompt_tokens} tokens (longest "
            f"{max(prompts)}), {cut} have answers over {task.max_new_tokens} tokens",
            hint="; ".join(hints),
        )


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
            f"top {signal.top_k} tokens of {examples} examples: at most {size / 2**30:.1f} GiB beside the checkpoints"
        )
        checks.add("teacher_signal", "ok", what)
