"""Checks of the data: rows, splits, tokens and lengths against the models' limits, and the training steps they make."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from skd_lib.config import HeldOutFiles, HubSource, MultinodeConfig, RunConfig, Schedule, TaskConfig, TrainingConfig
from skd_lib.data import sources
from skd_lib.data.examples import Example
from skd_lib.data.prepared import data_fingerprint
from skd_lib.data.splits import REFUSE_ABOVE, RUN_SPLITS, Splits, complaints, divide
from skd_lib.data.tokenize import TokenizedExample, encode, encode_prompt
from skd_lib.distillation.methods import METHODS
from skd_lib.errors import SkdError
from skd_lib.preflight.checks import Checks, distinct
from skd_lib.preflight.examples import check_format, show_example
from skd_lib.preflight.models import Model
from skd_lib.preflight.templates import check_rendered_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_ROWS = 200_000
"""Rows of each data file that are checked; `prepare_data` checks all."""
MAX_HUB_ROWS = 1_000
MAX_TOKENIZED = 200
NEAR_CHARACTERS = 500_000
"""Of each split, in which near duplicates are looked for: a second or two."""
_MAX_TOKENIZED_CHARACTERS = 1_000_000
_CHARACTERS_PER_TOKEN = 16  # more than a token has on average in any text of people
_TRIED = 50
"""Prompts that are tokenised to find one that is too long, the longest texts first, or one that is not."""
_COMPARED = 2000
"""Characters of a text that are tokenised to compare tokenizers."""


def check_data(
    checks: Checks, config: RunConfig, models: list[Model], runs: Sequence[RunConfig]
) -> tuple[str, dict[str, Any]]:
    """Check rows, splits, lengths and training schedules.

    Returns:
        The data's fingerprint, empty if they cannot be read, and what a plan assumes otherwise: rows and lengths.
    """
    from skd_lib.planning.measure import data_figures

    max_rows = MAX_HUB_ROWS if isinstance(config.data.source, HubSource) else MAX_ROWS
    source = checks.attempt("data", lambda: sources.load_data(config.data, max_rows=max_rows))
    held_out = _held_out(checks, config)
    if source is None:
        return "", {}
    whole = checks.attempt("data", lambda: divide(source, config.data, config.seed, held_out, NEAR_CHARACTERS))
    if whole is None:
        return "", {}
    splits = whole.by_turn() if config.data.assistant_turns == "all" else whole
    some = any(len(rows) >= max_rows for rows in (source.train, source.validation or (), source.test or ()))
    left = _check_rows(checks, whole, f" (of the first {max_rows:,} rows of each split or file only)" if some else "")
    if not check_format(checks, config, runs, whole):
        return "", {}
    train: list[TokenizedExample] = []
    if models:
        _check_special_tokens(checks, models[-1].tokenizer, splits)
    for student in models[1:] if models and models[0].role == "teacher" else ():
        _check_same_cuts(checks, models[0], student, splits.train_student)
    for model in models:
        rows = splits.train_teacher if model.role == "teacher" else splits.train_student
        check_reach(checks, model, config.task, [*rows, *splits.validation, *splits.test])
        for test_set in config.data.held_out:
            check_reach(checks, model, test_set.task, held_out.get(test_set.name, []))
    if models and models[-1].answer_end is not None:
        from skd_lib.models.vocabulary import eos_ids

        tokenizer = models[-1].tokenizer
        ends = (models[-1].answer_end, *eos_ids(models[-1].folder, tokenizer))
        checks.attempt("example", lambda: show_example(checks, config, tokenizer, ends, whole))
        train = _check_lengths(checks, config, tokenizer, ends, splits)
        for run in distinct(runs, lambda run: (run.student, run.student_init, run.distill)):
            of_run = [model for model in models if model.role == "teacher" or model.reference == run.student]
            _check_positions(checks, run, of_run, splits)
    if left:
        per_row = len(splits.train_student) / max(1, len(whole.train_student))
        _check_schedules(checks, config, left, runs, per_row)
    figures = data_figures(config, splits, train)
    return checks.attempt("data", lambda: data_fingerprint(config.data)) or "", figures


def _held_out(checks: Checks, config: RunConfig) -> dict[str, list[Example]]:
    """Return the held-out test sets; a run goes on without those that cannot be read."""
    found = {}
    for held_out in config.data.held_out:
        name = f"held-out {held_out.name}"
        limit = MAX_ROWS if isinstance(held_out.source, HeldOutFiles) else MAX_HUB_ROWS
        try:
            found[held_out.name] = sources.load_held_out(held_out, config.data, max_rows=limit)
        except SkdError as error:
            hint = "correct it; otherwise the run goes on and reports this set as missing"
            checks.add(name, "warning", error.brief, hint=hint)
        else:
            rows = len(found[held_out.name])
            checks.add(name, "ok", f"{rows} rows{' (the first rows only)' if rows >= limit else ''}")
    return found


def _check_rows(checks: Checks, splits: Splits, seen: str) -> int:
    """Report what each split loses, and return how many rows the training split keeps."""
    left = {name: max(0, splits.losses[name].rows - splits.losses[name].lost) for name in RUN_SPLITS}
    checks.add("data", "ok", f"rows: {', '.join(f'{name} {count}' for name, count in left.items())}{seen}")
    complained = {name: (level, error) for name, level, error in complaints(splits.losses)}
    for name, loss in splits.losses.items():
        if name in complained:
            level, error = complained[name]
            checks.failed(f"{name} left out", error, level)
        elif loss.lost or loss.looked_at is not None:
            checks.add(f"{name} left out", "ok", str(loss))
    return left["train"]


def _check_special_tokens(checks: Checks, tokenizer: PreTrainedTokenizerBase, splits: Splits) -> None:
    """Warn about inputs with special tokens as text: the tokenizer reads them as the tokens, here as everywhere."""
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


def _check_same_cuts(checks: Checks, teacher: Model, student: Model, examples: Sequence[Example]) -> None:
    """Warn where both tokenizers cut a text in different ways, as they may with the same tokens."""
    for example in examples[:_TRIED]:
        text = example.source[:_COMPARED]
        ours, theirs = teacher.tokenizer(text)["input_ids"], student.tokenizer(text)["input_ids"]
        if ours != theirs:
            place = next(i for i in range(len(text) + 2) if ours[: i + 1] != theirs[: i + 1])
            shown = [teacher.tokenizer.convert_ids_to_tokens(ids[place : place + 3]) for ids in (ours, theirs)]
            checks.add(
                "tokenizers",
                "warning",
                f"the tokenizers cut the same text in different ways: from token {place} on the teacher's has "
                f"{shown[0]}, the student's {shown[1]}; the teacher will read what the student's makes",
                where=example.place,
                hint="copy the teacher's tokenizer into the student's folder if the student was trained with it, too",
            )
            return


def check_reach(checks: Checks, model: Model, task: TaskConfig, examples: Sequence[Example]) -> None:
    """Check that no text, nor the chat template, makes an id that the models have no row for or never saw."""
    if not model.unreachable or model.answer_end is None:
        return
    spelt = re.compile("|".join(re.escape(token.strip() or token) for token in model.unreachable.values()), re.I)
    for number, example in enumerate(examples):
        if number and not spelt.search(f"{example.source}\n{example.target}"):
            continue
        encoded = encode(model.tokenizer, task, example, model.answer_end)
        reached = model.unreachable.keys() & {*encoded.prompt_ids, *encoded.response_ids}
        if reached:
            token = model.unreachable[min(reached)]
            checks.add(
                "data",
                "error",
                f"its prompt or answer has the token {token!r} (id {min(reached)}), which was added to a tokenizer "
                "alone: a model has no row for it, or has never seen it",
                where=example.place,
                hint="leave the token out of the data and the chat template, or use models that both have it",
            )
            return


def _check_lengths(
    checks: Checks, config: RunConfig, tokenizer: PreTrainedTokenizerBase, ends: Sequence[int], splits: Splits
) -> list[TokenizedExample]:
    """Compare a sample of each split with the limits on prompt and answer; return the training's."""
    task = config.task
    train: list[TokenizedExample] = []
    for name, rows in (("train", splits.train_student), ("validation", splits.validation), ("test", splits.test)):
        sample = sample_of(rows, task)
        if not sample or not check_rendered_rows(checks, name, tokenizer, task, sample):
            continue
        encoded = [encode(tokenizer, task, example, ends[0], ends) for example in sample]
        prompts = [len(example.prompt_ids) for example in encoded]
        if name == "train":
            train = [example for example in encoded if len(example.prompt_ids) <= task.max_prompt_tokens]
        long = sum(length > task.max_prompt_tokens for length in prompts)
        cut = sum(bool(example.response_ids) and example.response_ids[-1] not in ends for example in encoded)
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
    return train


def sample_of(rows: Sequence[Example], task: TaskConfig) -> list[Example]:
    """Return the first rows, as many as are tokenised in seconds, each cut where it is far over the limits."""
    sample: list[Example] = []
    characters, of_the_task = 0, len(task.system_prompt) + len(task.prompt)
    for row in rows[:MAX_TOKENIZED]:
        source = row.source[: _CHARACTERS_PER_TOKEN * task.max_prompt_tokens]
        target = row.target[: _CHARACTERS_PER_TOKEN * task.max_new_tokens]
        sample.append(replace(row, source=source, target=target) if row.conversation is None else row)
        characters += of_the_task + len(source) + len(target)
        if characters > _MAX_TOKENIZED_CHARACTERS:
            break
    return sample


def _check_positions(checks: Checks, run: RunConfig, models: Sequence[Model], splits: Splits) -> None:
    """Check that prompts and answers end before a model's rotary positions stretch: nothing is sampled beyond that.

    Reads the longest training prompts where the method samples, and the shortest test prompts.

    Args:
        checks: Takes the findings.
        run: The run.
        models: Its teacher, and its student unless that is cut from the teacher.
        splits: The data.
    """
    from skd_lib.sampling.cache import position_limit, stretches

    task, facts, tokenizer = run.task, METHODS[run.distill.method], models[-1].tokenizer
    for model in models:
        sampling = position_limit(model.skeleton, _longest_block(run))
        answering = position_limit(model.skeleton, 1)
        if sampling is None or answering is None or not stretches(model.skeleton):
            continue
        if task.max_prompt_tokens + task.max_new_tokens <= sampling:
            continue
        found = "{} and an answer of {} tokens need {} positions, the rotary ones of the {} stretch beyond {}"
        student_writes = facts.student_writes and (model.role == "student" or run.student_init.cuts)
        if student_writes or (facts.teacher_writes and model.role == "teacher"):
            for example in sorted(splits.train_student, key=lambda each: -len(each.source))[:_TRIED]:
                length = len(encode_prompt(tokenizer, task, example.question, example.target))
                needed = length + task.max_new_tokens
                if length <= task.max_prompt_tokens and needed > sampling:
                    prompt = f"its prompt of {length}"
                    checks.add(
                        "distill",
                        "error",
                        found.format(prompt, task.max_new_tokens, needed, model.role, sampling)
                        + f": `{run.distill.method}` cannot sample it",
                        where=example.place,
                        hint=f"lower task.max_prompt_tokens to {max(sampling - task.max_new_tokens, 1)}: longer "
                        "prompts are left out",
                    )
                    break
        tests = sorted(splits.test, key=lambda each: len(each.source))[:_TRIED]
        shortest = min((len(encode_prompt(tokenizer, task, each.question, each.target)) for each in tests), default=0)
        needed = shortest + task.max_new_tokens
        if needed > answering:
            prompt = f"the shortest test prompt of {shortest}"
            what = found.format(prompt, task.max_new_tokens, needed, model.role, answering)
            hint = "lower task.max_new_tokens, or shorten the prompts"
            checks.add("evaluation", "error", f"{what}: nothing can be answered", where="task", hint=hint)


def _longest_block(run: RunConfig) -> int:
    """Return how many positions the sampler of a run's distillation needs beyond a row's last token."""
    from skd_lib.distillation.rollouts import interleaving_rule

    sampling = run.distill.sampling
    if not METHODS[run.distill.method].interleaves:
        return 1
    gamma = sampling.gamma
    drafted = max(gamma.start, gamma.end) if isinstance(gamma, Schedule) else gamma
    drafted = min(drafted, run.task.max_new_tokens) if sampling.adaptive_gamma else drafted
    return int(drafted) + interleaving_rule(sampling, 0, 1).bonus


def _check_schedules(checks: Checks, config: RunConfig, rows: int, runs: Sequence[RunConfig], per_row: float) -> None:
    """Check that batches divide, and report the optimiser steps of each training, with `per_row` examples of a row."""
    from skd_lib.training.plan import plan_steps

    of_teacher, of_student = config.data.teacher_examples, config.data.student_examples
    trainings: list[tuple[str, TrainingConfig, MultinodeConfig | None, int | None]] = []
    if config.teacher_sft.enabled:
        trainings.append(("teacher_sft", config.teacher_sft.training, config.teacher_sft.multinode, of_teacher))
    tuned = distinct([run for run in runs if run.student_init.trains], lambda run: run.student_init)
    trainings += [("student_init", run.student_init.training, None, of_student) for run in tuned]
    distilled = distinct(runs, lambda run: (run.distill.training, run.distill.multinode))
    trainings += [("distill", run.distill.training, run.distill.multinode, of_student) for run in distilled]
    for step, training, multinode, limit in trainings:
        examples = round(per_row * min(rows, limit or rows))
        processes = multinode.least_processes if multinode else 1
        planned = checks.attempt(step, partial(plan_steps, training, examples, processes=processes))
        if planned is not None:
            checks.add(step, "ok", f"{planned.steps} optimiser steps of {training.batch_size} on {examples} examples")
    for run in distinct(runs, lambda run: (run.distill.method, run.distill.teacher_signal)):
        _report_stored_signal(checks, run, round(per_row * min(rows, of_student or rows)))


def _report_stored_signal(checks: Checks, config: RunConfig, examples: int) -> None:
    """Report how much storage the teacher's signal takes at most."""
    signal = config.distill.teacher_signal
    if signal.mode == "stored" and METHODS[config.distill.method].uses_divergence:
        size = examples * config.task.max_new_tokens * (8 * signal.top_k + 4) / 2**30
        what = f"top {signal.top_k} tokens of {examples} examples: at most {size:.1f} GiB next to the checkpoints"
        checks.add("teacher_signal", "ok", what)
