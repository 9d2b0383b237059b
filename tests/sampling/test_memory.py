"""Running out of memory while sampling: fewer rows at a time, the same samples."""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch

from skd_lib.errors import SkdError
from skd_lib.models.heads import decoder
from skd_lib.sampling.acceptance import AcceptanceRule, lossless, student_only, teacher_only, top_k
from skd_lib.sampling.engine import Samples
from tests.conftest import TinyModel
from tests.sampling.test_engine import PROMPTS, pair, rows, sampler

SEEDS = [3, 1, 4, 1, 5, 9]
ROWS = [*PROMPTS, [1, 20, 21, 22], [1, 33]]
RULES = [top_k(6), top_k(30), student_only(), teacher_only(), lossless()]


@contextmanager
def memory(model: Any, fits: Callable[[int, int, Any], bool]) -> Iterator[list[int]]:
    """A device on which a forward runs out of memory unless `fits(call, batch, cache)`; yields the batches seen."""
    batches: list[int] = []

    def check(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        batches.append(len(kwargs["input_ids"]))
        if not fits(len(batches), batches[-1], kwargs["past_key_values"]):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    hook = decoder(model).register_forward_pre_hook(check, with_kwargs=True)
    try:
        yield batches
    finally:
        hook.remove()


def assert_same(samples: Samples, expected: Samples) -> None:
    assert rows(samples) == rows(expected)
    assert torch.equal(samples.source_BT, expected.source_BT)
    assert torch.equal(samples.truncated_B, expected.truncated_B)
    if expected.teacher_states_BTH is not None:
        torch.testing.assert_close(samples.teacher_states_BTH, expected.teacher_states_BTH, rtol=1e-4, atol=1e-4)
    # Rows go on from the tokens they have, so nothing is drafted, tested or counted twice.
    assert samples.statistics == expected.statistics


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
@pytest.mark.parametrize("short", ["student", "teacher"])
@pytest.mark.parametrize("batch_size", [None, 5])
def test_rows_that_do_not_fit_are_halved(
    tiny_model: TinyModel, rule: AcceptanceRule, short: str, batch_size: int | None
) -> None:
    models = pair(tiny_model)
    states = rule.asks_teacher
    s = sampler(models, rule, max_new_tokens=20, gamma=3, batch_size=batch_size, keep_teacher_states=states)
    expected = s.sample(ROWS, SEEDS)
    with memory(models[short], lambda call, batch, cache: batch <= 2):
        assert_same(s.sample(ROWS, SEEDS), expected)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
@pytest.mark.parametrize("failing_call", range(2, 14, 3))
def test_memory_that_runs_out_in_the_middle(tiny_model: TinyModel, rule: AcceptanceRule, failing_call: int) -> None:
    models = pair(tiny_model)
    s = sampler(models, rule, eos_ids=(), max_new_tokens=20, gamma=3, batch_size=4)
    expected = s.sample(ROWS, SEEDS)
    short = models["student" if rule.drafts else "teacher"]
    with memory(short, lambda call, batch, cache: call < failing_call or batch <= 2) as batches:
        assert_same(s.sample(ROWS, SEEDS), expected)
    assert batches[failing_call - 2] > 2, "memory was to run out of rows in flight"


def test_what_does_not_fit_is_logged_once_and_remembered(
    tiny_model: TinyModel, caplog: pytest.LogCaptureFixture
) -> None:
    models = pair(tiny_model)
    s = sampler(models, top_k(6))
    with memory(models["teacher"], lambda call, batch, cache: batch <= 3) as batches, caplog.at_level(logging.WARNING):
        for _ in range(3):
            s.sample(ROWS, SEEDS)
    assert caplog.messages == ["out of memory while sampling 6 rows at a time: going on with 3"]
    assert sum(batch > 3 for batch in batches) == 1


def test_the_memory_of_the_failed_attempt_is_free_before_the_next(tiny_model: TinyModel) -> None:
    """Without waiting for the garbage collector."""
    models = pair(tiny_model)
    failed: list[weakref.ref[Any]] = []

    def fits(call: int, batch: int, cache: Any) -> bool:
        assert all(ref() is None for ref in failed)
        if batch > 2 and call > 3:
            failed.append(weakref.ref(cache))
            return False
        return True

    gc.disable()
    try:
        with memory(models["teacher"], fits):
            sampler(models, top_k(6), eos_ids=()).sample(ROWS, SEEDS)
    finally:
        gc.enable()
    assert failed


def test_one_row_that_does_not_fit_is_an_error(tiny_model: TinyModel) -> None:
    models = pair(tiny_model)
    with (
        memory(models["teacher"], lambda call, batch, cache: False),
        pytest.raises(SkdError, match="not even one row fits") as error,
    ):
        sampler(models, top_k(6)).sample(ROWS, SEEDS)
    assert isinstance(error.value.__cause__, torch.OutOfMemoryError)


def test_progress_never_falls_back(tiny_model: TinyModel) -> None:
    models = pair(tiny_model)
    seen: list[int] = []
    with memory(models["student"], lambda call, batch, cache: call < 6 or batch <= 2):
        sampler(models, top_k(20)).sample(ROWS, SEEDS, seen.append)
    assert seen == sorted(seen)
    assert seen[-1] == len(ROWS)


def test_replacing_a_field_forgets_what_did_not_fit(tiny_model: TinyModel) -> None:
    """Shorter responses, or another model, may well fit."""
    models = pair(tiny_model)
    s = sampler(models, student_only())
    with memory(models["student"], lambda call, batch, cache: batch <= 3):
        s.sample(ROWS, SEEDS)
    with memory(models["student"], lambda call, batch, cache: True) as batches:
        replace(s, max_new_tokens=4).sample(ROWS, SEEDS)
    assert max(batches) == len(ROWS)
