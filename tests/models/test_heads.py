from __future__ import annotations

import pytest
import torch
from torch import nn

from skd_lib.models.heads import decoder, lm_logits
from tests.conftest import CONFIGS, TinyModel

TOKENS = torch.arange(4, 4 + 3 * 5).reshape(3, 5)


@pytest.mark.parametrize("arch", sorted(CONFIGS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("gradient", [False, True])
def test_both_halves_are_the_whole_model(tiny_model: TinyModel, arch: str, dtype: torch.dtype, gradient: bool) -> None:
    model = tiny_model(arch).to(dtype)
    with torch.set_grad_enabled(gradient):
        expected = model(TOKENS).logits
        states = decoder(model)(input_ids=TOKENS).last_hidden_state
        for cut in (slice(None), slice(4, None), 4):  # a block, one position, one state a row
            logits = lm_logits(model, states[:, cut])
            torch.testing.assert_close(logits, expected[:, cut])
            assert logits.dtype == dtype
            assert logits.requires_grad == gradient


@torch.no_grad()
def test_hooks_on_a_head_are_called(tiny_model: TinyModel) -> None:
    model, seen = tiny_model(), []
    states = torch.randn(2, 32, generator=torch.Generator().manual_seed(0))
    plain = lm_logits(model, states)
    head = model.get_output_embeddings()
    hook = head.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
    lm_logits(model, states)
    assert seen == [(2, 32)]
    hook.remove()
    head.forward = lambda states: 2 * type(head).forward(head, states)  # as accelerate's hooks do
    torch.testing.assert_close(lm_logits(model, states), 2 * plain)


@torch.no_grad()
def test_a_head_of_another_kind_is_called(tiny_model: TinyModel) -> None:
    model = tiny_model(tie_word_embeddings=False)
    biased = nn.Linear(32, 320)
    model.set_output_embeddings(biased)
    states = torch.randn(2, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(lm_logits(model, states), biased(states))
    with torch.autocast("cpu", torch.bfloat16):
        assert lm_logits(tiny_model(), states).dtype == torch.bfloat16
