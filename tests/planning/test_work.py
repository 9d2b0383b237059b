"""The formulas of arithmetic, traffic and time, against counts of real passes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode
from transformers import MixtralConfig, MixtralForCausalLM

from skd_lib.planning.measure import fitted, padding
from skd_lib.planning.memory import config_size, skeleton_size
from skd_lib.planning.work import (
    Pass,
    Rates,
    forward_bytes,
    forward_flops,
    forward_terms,
    gather_seconds,
    reduce_seconds,
    training_terms,
    update_seconds,
)
from tests.conftest import TinyModel

ROWS, WIDTH = 3, 40
WHOLE = Pass(ROWS, WIDTH, WIDTH, ROWS * WIDTH, cached=False)
"""Attention over all positions, as it is computed without a kernel that leaves out what a causal mask hides."""
RATES = Rates(1e12, 5e11, 1e11, 1e11, 1e-6, 1e10, 1e9, 2)


def counted(model: Any, *, backward: bool) -> int:
    model.set_attn_implementation("eager")
    tokens = torch.ones(ROWS, WIDTH, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        logits = model(input_ids=tokens, use_cache=False).logits
        if backward:
            logits.sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("arch", ["llama", "qwen3", "gemma", "mistral"])
def test_arithmetic_is_what_torch_counts(tiny_model: TinyModel, arch: str) -> None:
    model = tiny_model(arch, hidden=64)
    size = skeleton_size(model)
    assert forward_flops(size, WHOLE) == pytest.approx(counted(model, backward=False), rel=0.01)
    arithmetic = training_terms(size, WHOLE, RATES, passes=3)["arithmetic"] * RATES.training
    assert arithmetic == pytest.approx(counted(model, backward=True), rel=0.01)


def test_a_token_computes_with_the_experts_it_is_sent_to() -> None:
    options = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = MixtralConfig(**options, num_key_value_heads=2, vocab_size=320, num_local_experts=6, num_experts_per_tok=2)
    model = MixtralForCausalLM(config)
    expert = 3 * 64 * 96
    attention = 64 * 64 * 2 + 64 * 32 * 2
    size = skeleton_size(model)
    assert size.computing == 2 * (attention + 2 * expert + 6 * 64)  # and the router
    assert size.inside == sum(weight.numel() for weight in model.parameters()) - 2 * 320 * 64
    assert size == config_size(config)


@pytest.mark.parametrize("tied", [True, False])
def test_a_forward_reads_its_weights_and_the_cache(tiny_model: TinyModel, tied: bool) -> None:
    model = tiny_model(tie_word_embeddings=tied)
    size = skeleton_size(model)
    embedding = 320 * 32
    read = sum(weight.numel() for weight in model.parameters()) - (0 if tied else embedding)
    one = Pass(1, 1, 1, 1, cached=False)
    assert forward_bytes(size, one, 2) == 2 * read
    cached = Pass(5, 1, 100, 5)
    assert forward_bytes(size, cached, 2) - 2 * read == 2 * 5 * 100 * 2 * (2 * 2 * 8)  # layers, keys and values
    assert forward_bytes(size, Pass(1, 1, 1, 0, cached=False), 2) == 2 * (read - embedding)


def test_a_cut_model_has_its_share(tiny_model: TinyModel) -> None:
    cut, real = skeleton_size(tiny_model(layers=4)).pruned(1), skeleton_size(tiny_model(layers=1))
    assert (cut.layers, cut.computing, cut.adapted) == (real.layers, real.computing, real.adapted)
    assert cut.parameters == pytest.approx(real.parameters, rel=0.01)


def test_exchanges_take_what_a_ring_takes() -> None:
    # Each of n devices sends and receives 2 (n - 1) / n of the gradients; half of it to gather weights.
    assert reduce_seconds(1000, 4, RATES, per_node=8) == 2 * 3 / 4 * 1000 * 4 / RATES.link
    assert reduce_seconds(1000, 16, RATES, per_node=8) == 2 * 15 / 16 * 1000 * 4 / (8 * RATES.network)
    assert reduce_seconds(1000, 1, RATES, per_node=8) == 0
    assert gather_seconds(1000, 4, RATES, per_node=8, element=2) == 3 / 4 * 1000 * 2 / RATES.link
    assert update_seconds(100, RATES) == 2800 / RATES.update


counts = st.integers(1, 500)


@given(rows=counts, width=counts, context=counts, more=counts, split=st.sampled_from([1, 2, 4, 8]))
def test_more_takes_longer_and_devices_share_the_work(
    rows: int, width: int, context: int, more: int, split: int
) -> None:
    from skd_lib.models.shapes import SHAPES

    size = _size(SHAPES["qwen2.5-0.5b"])
    one = forward_terms(size, Pass(rows, width, context, rows), RATES)
    for larger in (
        Pass(rows + more, width, context, rows + more),
        Pass(rows, width + more, context, rows),
        Pass(rows, width, context + more, rows),
        Pass(rows, width, context, rows + more),
    ):
        found = forward_terms(size, larger, RATES)
        assert all(found[name] >= one[name] for name in one)
    shared = forward_terms(size, Pass(rows, width, context, rows), RATES, split=split)
    assert shared["arithmetic"] == pytest.approx(one["arithmetic"] / split)
    assert shared["memory"] == pytest.approx(one["memory"] / split)
    assert (shared["link"] > 0) == (split > 1)


def _size(shape: Any, found: dict[Any, Any] = {}) -> Any:  # noqa: B006 - kept between examples
    if shape not in found:
        found[shape] = config_size(shape())
    return found[shape]


@given(costs=st.tuples(*[st.sampled_from([0.0, 0.5, 2.0])] * 3).filter(any), seed=st.integers(0, 99))
def test_costs_are_found_from_times(costs: tuple[float, ...], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.rand(8, 3, generator=generator, dtype=torch.float64).add(0.1).tolist()
    seconds = [sum(cost * part for cost, part in zip(costs, row, strict=True)) for row in rows]
    assert fitted(rows, seconds) == pytest.approx(costs, abs=1e-6)


def test_rows_of_like_length_share_a_forward_pass() -> None:
    # Batches (1 2 | 3 4) and (5 5 | 5 9), sorted: 4 + 8 and 10 + 18 positions for 10 and 24 tokens.
    assert padding([4, 1, 3, 2, 9, 5, 5, 5], 4, 2) == 40 / 34
    assert padding([4, 1, 3, 2], 4, 1) == 1


def test_no_cost_is_negative() -> None:
    # The second would be: it is left out, and the first fits as well as it can.
    assert fitted([[1, 0], [1, 1]], [2.0, 1.0])[1] == 0
