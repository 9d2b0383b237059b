"""The choice of the draft length, and that samples do not depend on it."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from skd_lib.sampling.acceptance import AcceptanceRule, lossless, min_prob, mixture, student_only, teacher_only, top_k
from skd_lib.sampling.drafting import AdaptiveGamma, Costs, estimated_costs
from skd_lib.sampling.samples import SamplingStatistics
from tests.conftest import TinyModel
from tests.sampling.test_engine import PROMPTS, VOCABULARY, pair, rows, sampler

GPU = Costs(student=0.2, token=0.0)
CPU = Costs(student=0.5, token=0.08)


def measured(acceptance: float) -> SamplingStatistics:
    return SamplingStatistics(accepted=round(1e6 * acceptance), tested=10**6)


@pytest.mark.parametrize("costs", [GPU, CPU], ids=["gpu", "cpu"])
@pytest.mark.parametrize("bonus", [False, True])
@pytest.mark.parametrize("acceptance", [0.0, 0.3, 0.66, 0.9, 1.0])
@pytest.mark.parametrize("rows", [1, 8])
def test_the_choice_has_the_most_tokens_for_its_cost(costs: Costs, bonus: bool, acceptance: float, rows: int) -> None:
    """By simulating which of the drafted tokens are accepted, over all outcomes."""

    def tokens_per_cost(gamma: int) -> float:
        tokens = 0.0
        for accepted in itertools.product([True, False], repeat=gamma):
            probability = 1.0
            for yes in accepted:
                probability *= acceptance if yes else 1 - acceptance
            prefix = gamma if all(accepted) else accepted.index(False)
            tokens += probability * (prefix + 1 if prefix < gamma or bonus else gamma)
        drafting = gamma * costs.student * (1 + costs.token * (rows - 1))
        return tokens / (drafting + 1 + costs.token * (rows * (gamma + bonus) - 1))

    chosen = AdaptiveGamma(6).choose(measured(acceptance), costs, rows=rows, bonus=bonus)
    assert tokens_per_cost(chosen) >= max(map(tokens_per_cost, range(1, 7))) * (1 - 1e-4)


def test_a_block_never_runs_beyond_the_responses_end(tiny_model: TinyModel) -> None:
    """Whatever the longest is: neither choosing it nor making room for it takes time."""
    s = sampler(pair(tiny_model), top_k(30), max_new_tokens=8, eos_ids=())
    expected, samples = (
        replace(s, gamma=AdaptiveGamma(most, costs=GPU)).sample(PROMPTS, range(4)) for most in (8, 10**9)
    )
    assert rows(samples) == rows(expected)
    assert samples.statistics == expected.statistics
    assert AdaptiveGamma(10**9).choose(measured(1.0), GPU, rows=8, bonus=False) > 100


def test_the_fewer_rows_the_longer_the_block() -> None:
    """On a CPU a token more costs little beside reading the weights, but eight times as much with eight rows."""
    chosen = [AdaptiveGamma(8).choose(measured(0.8), CPU, rows=rows, bonus=False) for rows in (1, 4, 16)]
    assert chosen == sorted(chosen, reverse=True)
    assert chosen[0] > chosen[-1]


def test_it_follows_the_acceptance() -> None:
    chosen = [AdaptiveGamma(8).choose(measured(a / 20), GPU, rows=8, bonus=False) for a in range(21)]
    assert chosen == sorted(chosen)
    assert (chosen[0], chosen[-1]) == (1, 8)


def test_before_anything_is_measured_it_expects_what_it_is_told() -> None:
    nothing_yet = SamplingStatistics()
    for acceptance in (0.1, 0.5, 0.95):
        gamma = AdaptiveGamma(8, acceptance=acceptance)
        assert gamma.choose(nothing_yet, GPU, rows=8, bonus=False) == gamma.choose(
            measured(acceptance), GPU, rows=8, bonus=False
        )


@pytest.mark.parametrize(
    "rule",
    [top_k(6), top_k(30), student_only(), teacher_only(), min_prob(0.02), mixture(0.5)],
    ids=["top_k(6)", "top_k(30)", "student_only", "teacher_only", "min_prob", "mixture"],
)
@pytest.mark.parametrize("batch_size", [2, None])
def test_samples_do_not_depend_on_adapting(tiny_model: TinyModel, rule: AcceptanceRule, batch_size: int | None) -> None:
    fixed = sampler(pair(tiny_model), rule, max_new_tokens=24, gamma=3)
    adaptive = replace(fixed, gamma=AdaptiveGamma(6, costs=GPU), batch_size=batch_size)
    expected, samples = (s.sample(PROMPTS, [3, 1, 4, 1]) for s in (fixed, adaptive))
    assert rows(samples) == rows(expected)
    assert torch.equal(samples.source_BT, expected.source_BT)
    assert samples.statistics.tokens == expected.statistics.tokens
    assert samples.statistics.replaced == expected.statistics.replaced


@pytest.mark.parametrize(("k", "longest"), [(0, 1), (VOCABULARY, 6)])
def test_rounds_become_short_or_long(tiny_model: TinyModel, k: int, longest: int) -> None:
    """By the end of a call of many rounds nearly all blocks have the best length."""
    s = sampler(pair(tiny_model), top_k(k), eos_ids=(), max_new_tokens=120, gamma=AdaptiveGamma(6, costs=GPU))
    statistics = s.sample(PROMPTS, range(4)).statistics
    assert statistics.drafted / statistics.teacher_calls == pytest.approx(longest, abs=0.5)


def test_few_drafted_tokens_are_wasted(tiny_model: TinyModel) -> None:
    fixed = sampler(pair(tiny_model), top_k(20), eos_ids=(), max_new_tokens=60, gamma=6)
    adaptive = replace(fixed, gamma=AdaptiveGamma(6, costs=CPU))
    wasted = [
        (n.drafted - n.tested) / n.drafted for n in (s.sample(PROMPTS, range(4)).statistics for s in (fixed, adaptive))
    ]
    assert wasted[1] < wasted[0] / 2


def test_calls_do_not_depend_on_the_calls_before(tiny_model: TinyModel) -> None:
    s = sampler(pair(tiny_model), lossless(), max_new_tokens=24, gamma=AdaptiveGamma(6, costs=GPU))
    first = s.sample(PROMPTS, range(4))
    s.sample(PROMPTS[:1], [9])
    again = s.sample(PROMPTS, range(4))
    assert rows(again) == rows(first)
    assert again.statistics == first.statistics


def test_costs_are_estimated_from_the_weights_that_are_read(tiny_model: TinyModel) -> None:
    whole, half = tiny_model(layers=4), tiny_model(layers=2)
    costs = estimated_costs(half, whole)
    assert 0.5 < costs.student < 1
    assert costs.token > 0  # on a CPU
    # An embedding apart from the head is looked up, not read: the estimate stays.
    untied = [tiny_model(layers=layers, tie_word_embeddings=False) for layers in (2, 4)]
    assert estimated_costs(*untied).student == pytest.approx(costs.student)


def test_the_estimate_is_used_where_no_costs_are_given(tiny_model: TinyModel) -> None:
    models = pair(tiny_model)
    s = sampler(models, top_k(30), max_new_tokens=24, eos_ids=(), gamma=AdaptiveGamma(6))
    told = replace(s, gamma=AdaptiveGamma(6, costs=estimated_costs(models["student"], models["teacher"])))  # type: ignore[arg-type]
    statistics = [x.sample(PROMPTS, range(4)).statistics for x in (s, told)]
    assert statistics[0] == statistics[1]
