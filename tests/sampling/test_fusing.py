"""Compiled norms and rotary positions compute what the model's own do, and leave the model as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from skd_lib.sampling.fusing import fused
from tests.conftest import TinyModel
from tests.sampling.test_architectures import with_lora
from tests.sampling.test_engine import ARCHITECTURES, pair


@torch.no_grad()
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_logits_are_the_models_own(tiny_model: TinyModel, arch: str) -> None:
    models: list[Any] = list(pair(tiny_model, arch).values())
    for shape in ((4, 1), (4, 3), (1, 1), (2, 5), (8, 1)):
        tokens = torch.randint(3, 48, shape, generator=torch.Generator().manual_seed(0))
        for model in models:
            expected = model(tokens).logits
            with fused(models, backend="eager"):
                torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_compiled_once_for_all_layers_and_shapes(tiny_model: TinyModel) -> None:
    """Apart from single rows, which torch compiles for themselves."""
    counter = CompileCounter()
    for layers in (2, 12):
        model = tiny_model(layers=layers)
        for shape in ((4, 1), (4, 3), (2, 5), (8, 1)):
            with fused([model], backend=counter):
                model(torch.ones(shape, dtype=torch.long))
    assert counter.frame_count == 2  # a norm, a rotation


@torch.no_grad()
def test_the_models_are_left_as_they_were(tiny_model: TinyModel) -> None:
    import transformers.models.llama.modeling_llama as modeling

    model = with_lora(tiny_model(), target_modules=["q_proj"])
    rotate, counter = modeling.apply_rotary_pos_emb, CompileCounter()
    with pytest.raises(ValueError, match="specify exactly one"), fused([model], backend=counter):
        model(model(torch.ones(2, 3, dtype=torch.long)) and None)
    assert counter.frame_count > 0
    model(torch.ones(5, 6, dtype=torch.long))
    assert modeling.apply_rotary_pos_emb is rotate
    assert not any("forward" in vars(module) for module in model.modules())


@torch.no_grad()
def test_what_cannot_be_compiled_runs_as_it_is(tiny_model: TinyModel) -> None:
    def broken(graph: Any, inputs: Any) -> Any:
        raise RuntimeError("no compiler here")

    model, tokens = tiny_model("gemma"), torch.ones(2, 3, dtype=torch.long)
    expected = model(tokens).logits
    with fused([model], backend=broken):
        torch.testing.assert_close(model(tokens).logits, expected)
