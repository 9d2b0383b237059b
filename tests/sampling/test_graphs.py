"""Rounds as CUDA graphs, as far as they can be tested without a GPU.

A graph repeats a round's kernels on the same memory. Here a "graph" plays the round again and copies what comes out
to where it came out first, so that everything but the capture itself is what runs on a GPU.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from skd_lib.sampling import cache
from skd_lib.sampling.acceptance import AcceptanceRule, lossless, min_prob, mixture, student_only, teacher_only, top_k
from skd_lib.sampling.cache import attention_mask
from skd_lib.sampling.cuda_graphs import GraphedRounds
from skd_lib.sampling.drafting import AdaptiveGamma
from skd_lib.sampling.engine import Sampler
from skd_lib.sampling.round import Interleaving, Verdict
from tests.conftest import TinyModel
from tests.sampling.test_architectures import with_lora
from tests.sampling.test_engine import ARCHITECTURES, GREEDY, PROMPTS, STUDENT_SAMPLES, pair, rows, sampler
from tests.sampling.test_memory import assert_same, memory

RULES = [top_k(6), min_prob(0.05), mixture(0.4), lossless(), student_only(), teacher_only()]
# All rules where a cache grows and where its windows slide, as in test_engine.py.
PAIRS = [
    pytest.param(arch, rule, id=f"{rule.name}-{arch}")
    for arch in ARCHITECTURES
    for rule in RULES
    if arch in ("llama", "gemma3") or rule is RULES[0]
]
MANY = [*PROMPTS, [1, 20, 21, 22], [1, 33], [1, 9, 9]]
SEEDS = [3, 1, 4, 1, 5, 9, 2]
SYNCHRONISING = {"aten._local_scalar_dense", "aten.nonzero", "aten.masked_select", "aten._to_copy", "aten.equal"}
"""Operators that make the host wait for the device, or copy between the two."""


def tensors(verdict: Verdict) -> list[torch.Tensor]:
    parts = [getattr(verdict, field.name) for field in fields(verdict)]
    return [part for part in parts if part is not None]


class Graphs:
    """Captures rounds as a GPU would, and counts."""

    def __init__(self) -> None:
        self.captured = self.replayed = 0

    def __call__(self, play: Callable[[], Verdict]) -> tuple[Callable[[], object], Verdict]:
        self.captured += 1
        first = play()

        def replay() -> None:
            self.replayed += 1
            for there, now in zip(tensors(first), tensors(play()), strict=True):
                there.copy_(now)

        return replay, first


def graphed(s: Sampler, capture: Any) -> Sampler:
    s = replace(s)
    vars(s)["graphed_rounds"] = GraphedRounds(s.interleaving.round, s.models, lambda: capture)
    return s


@pytest.mark.parametrize(("arch", "rule"), [each for each in PAIRS if each.values[0] in ("llama", "gemma2", "gemma3")])
def test_the_samples_are_those_without_graphs(tiny_model: TinyModel, arch: str, rule: AcceptanceRule) -> None:
    models = pair(tiny_model, arch)
    plain = sampler(models, rule, gamma=3, max_new_tokens=20, batch_size=3, keep_teacher_states=rule.asks_teacher)
    graphs = Graphs()
    s = graphed(plain, graphs)
    for prompts in (MANY, MANY[3:], [[1, *range(3, 40)] * 2, *MANY[1:]]):  # the last needs more room than there is
        assert_same(s.sample(prompts, SEEDS[: len(prompts)]), plain.sample(prompts, SEEDS[: len(prompts)]))
    assert graphs.replayed > 4 * graphs.captured


def test_a_second_call_captures_nothing(tiny_model: TinyModel) -> None:
    graphs = Graphs()
    s = graphed(sampler(pair(tiny_model), top_k(6), max_new_tokens=20, eos_ids=()), graphs)
    s.sample(MANY, SEEDS)
    captured = graphs.captured
    s.sample(MANY, SEEDS)
    assert graphs.captured == captured


def test_weights_that_change_in_place_are_read_and_weights_that_move_are_captured_anew(tiny_model: TinyModel) -> None:
    models: dict[str, Any] = pair(tiny_model)
    graphs = Graphs()
    plain = sampler(models, student_only(), max_new_tokens=20, eos_ids=())
    s = graphed(plain, graphs)
    before = rows(s.sample(MANY, SEEDS))
    captured = graphs.captured
    with torch.no_grad():
        models["student"].lm_head.weight.mul_(-1)
    after = rows(s.sample(MANY, SEEDS))
    assert after == rows(plain.sample(MANY, SEEDS)) != before
    assert graphs.captured == captured
    models["student"].model.norm.weight = torch.nn.Parameter(models["student"].model.norm.weight.clone())
    s.sample(MANY, SEEDS)
    assert graphs.captured == 2 * captured


@pytest.mark.parametrize("rule", [student_only(), top_k(6)], ids=lambda rule: rule.name)
def test_rows_that_ended_together_do_no_harm_in_the_next_call(tiny_model: TinyModel, rule: AcceptanceRule) -> None:
    """They wait as rows of one token: at their full length a round would find no token of theirs to keep."""
    plain = sampler(pair(tiny_model), rule, max_new_tokens=20, eos_ids=())
    s = graphed(plain, Graphs())
    for prompts in (MANY[:4], MANY[:3], MANY):
        assert_same(s.sample(prompts, SEEDS[: len(prompts)]), plain.sample(prompts, SEEDS[: len(prompts)]))


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_every_query_sees_something(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch, rule: AcceptanceRule
) -> None:
    """A row of nothing but masked keys is NaN on a GPU; rows that wait and prompts of one token could have one."""
    seen = []

    def watched(*args: Any) -> Any:
        mask = attention_mask(*args)
        seen.append(mask.any(-1).all().item())  # type: ignore[union-attr]
        return mask

    monkeypatch.setattr(cache, "attention_mask", watched)
    graphed(sampler(pair(tiny_model), rule, max_new_tokens=20), Graphs()).sample([[1], [1], [1, 5]], SEEDS[:3])
    assert all(seen)
    assert len(seen) > 5


def test_graphs_that_are_given_up_are_followed_by_those_of_a_new_pool(tiny_model: TinyModel) -> None:
    """CUDA has no memory pool without graphs: its name could not be used again."""
    s = sampler(pair(tiny_model), top_k(6), max_new_tokens=20)
    pools: list[Graphs] = []
    rounds = GraphedRounds(s.interleaving.round, s.models, lambda: pools.append(Graphs()) or pools[-1])  # type: ignore[func-returns-value]
    vars(s)["graphed_rounds"] = rounds
    s.sample(MANY, SEEDS)
    s.sample(MANY, SEEDS)
    assert len(pools) == 1
    for give_up in (rounds.clear, lambda: s.sample([[1, *range(3, 40)] * 3], [0])):  # the second needs more room
        give_up()
        s.sample(MANY, SEEDS)
    assert len(pools) == 3


def test_adapters_that_are_switched_off_are_captured_anew(tiny_model: TinyModel) -> None:
    student: Any = with_lora(tiny_model(seed=1, vocab_size=48), target_modules=["q_proj"])
    graphs = Graphs()
    plain = sampler({"student": student, "teacher": None}, student_only(), max_new_tokens=20, eos_ids=())
    s = graphed(plain, graphs)
    adapted = rows(s.sample(MANY, SEEDS))
    captured = graphs.captured
    with student.disable_adapter():
        assert rows(s.sample(MANY, SEEDS)) == rows(plain.sample(MANY, SEEDS)) != adapted
    assert graphs.captured == 2 * captured


def test_adaptive_draft_lengths_have_a_graph_each(tiny_model: TinyModel) -> None:
    plain = sampler(pair(tiny_model), top_k(20), gamma=AdaptiveGamma(4), max_new_tokens=30, eos_ids=())
    assert_same(graphed(plain, Graphs()).sample(MANY, SEEDS), plain.sample(MANY, SEEDS))


def test_memory_that_runs_out_is_given_back(tiny_model: TinyModel) -> None:
    models = pair(tiny_model)
    plain = sampler(models, top_k(6), gamma=3, max_new_tokens=20)
    expected = plain.sample(MANY, SEEDS)
    s = graphed(plain, Graphs())
    held: list[float] = []

    def two_rows(call: int, batch: int, cache: Any) -> bool:
        if cache.layers[0].is_initialized:
            held.append(storage_of(cache).nbytes() / cache.layers[0].keys[0].nbytes)
        return batch <= 2

    with memory(models["teacher"], two_rows):
        assert rows(s.sample(MANY, SEEDS)) == rows(expected)
    assert 0 < held[-1] <= 2  # rows that there is memory for


def test_room_for_other_shapes_is_given_back_before_rows_are_halved(tiny_model: TinyModel) -> None:
    """Memory for many short rows, and then for a long one, would have to hold many long ones."""
    models = pair(tiny_model)
    plain = sampler(models, top_k(6), gamma=3, max_new_tokens=20)
    s = graphed(plain, Graphs())
    long = [[1, *range(3, 40)] * 6]
    with memory(models["teacher"], lambda call, batch, cache: len(storage_of(cache)) <= 8 * 2**15):
        assert rows(s.sample(MANY, SEEDS)) == rows(plain.sample(MANY, SEEDS))
        assert rows(s.sample(long, SEEDS[:1])) == rows(plain.sample(long, SEEDS[:1]))
        assert s.batch_limit.slots is None


def storage_of(cache: Any) -> torch.UntypedStorage:
    """All the memory that a cache of the rows in flight, or of a prefill, is part of; one layer's keys."""
    keys = cache.layers[0].keys if cache.layers[0].is_initialized else torch.empty(0)
    return keys.untyped_storage()  # type: ignore[no-any-return]


def test_what_cannot_be_captured_runs_without_graphs(tiny_model: TinyModel, caplog: pytest.LogCaptureFixture) -> None:
    def refuse(play: Callable[[], Verdict]) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing")

    plain = sampler(pair(tiny_model), top_k(6), max_new_tokens=20)
    with caplog.at_level(logging.WARNING):
        assert_same(graphed(plain, refuse).sample(MANY, SEEDS), plain.sample(MANY, SEEDS))
    assert [record.message.partition(":")[0] for record in caplog.records] == [
        "rounds run without CUDA graphs, which is slower"
    ]


@pytest.mark.parametrize(("arch", "rule"), PAIRS)
def test_a_round_never_asks_the_device_for_a_value(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch, arch: str, rule: AcceptanceRule
) -> None:
    """A capture would end in an error otherwise, and without graphs the launches would stall."""

    class NoSynchronisation(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name = f"{func.namespace}.{func._schema.name.partition('::')[2]}"
            index = args[1] if name.startswith("aten.index") and isinstance(args[1], (list, tuple)) else ()
            assert not any(part is not None and part.dtype == torch.bool for part in index), "an index by a mask"
            copies = name == "aten._to_copy" and (kwargs or {}).get("device") not in (None, args[0].device)
            assert name not in SYNCHRONISING - {"aten._to_copy"} and not copies, name  # noqa: PT018
            return func(*args, **(kwargs or {}))

    play, played = Interleaving.round, []

    def watched(*args: Any) -> Verdict:
        with NoSynchronisation():
            played.append(args)
            return play(*args)

    monkeypatch.setattr(Interleaving, "round", watched)
    for params in (GREEDY, STUDENT_SAMPLES):
        s = sampler(
            pair(tiny_model, arch), rule, gamma=3, max_new_tokens=1, student_params=params, teacher_params=params
        )
        s.sample(PROMPTS, [0] * 4)
    assert len(played) == 2
