from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel

from skd_lib.errors import SkdError
from skd_lib.models.heads import check_supported, decoder, lm_logits, vocabulary_size
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


SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 160,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.2,
}
GEMMA4 = SHAPE | {
    "final_logit_softcapping": 3.0,
    "global_head_dim": 8,
    "layer_types": ["sliding_attention", "full_attention"],
    "vocab_size_per_layer_input": 160,
    "hidden_size_per_layer_input": 8,
    "num_kv_shared_layers": 0,
}
VISION = {"model_type": "gemma4_vision", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
OTHER_HEADS: dict[str, dict[str, Any]] = {
    "granite": SHAPE | {"logits_scaling": 8.0},
    "hyperclovax": SHAPE | {"logits_scaling": 0.125},
    "cohere2": SHAPE | {"logit_scale": 0.25},
    "minicpm3": SHAPE
    | {"num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8}
    | {"v_head_dim": 8},
    "falcon_h1": SHAPE | {"lm_head_multiplier": 0.04, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8},
    "recurrent_gemma": SHAPE | {"logits_soft_cap": 1.0, "lru_width": 32, "num_hidden_layers": 3},
    "gemma4_text": GEMMA4,
    "gemma4": {
        "text_config": GEMMA4,
        "vision_config": VISION | {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8},
        "audio_config": None,
    },
    "xlstm": {
        "hidden_size": 32,
        "num_heads": 2,
        "num_hidden_layers": 2,
        "vocab_size": 160,
        "output_logit_soft_cap": 2.0,
    },
}


def other_model(arch: str, options: dict[str, Any]) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(arch, **options))
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.data.normal_(0, 0.3)
    return model.eval()  # type: ignore[no-any-return]


@torch.no_grad()
@pytest.mark.parametrize("arch", OTHER_HEADS)
def test_factors_and_caps_of_other_architectures(arch: str) -> None:
    model = other_model(arch, OTHER_HEADS[arch])
    states = decoder(model)(input_ids=TOKENS, use_cache=False).last_hidden_state
    expected = model(input_ids=TOKENS, use_cache=False).logits
    torch.testing.assert_close(lm_logits(model, states), expected)
    plain = model.get_output_embeddings()(states)
    assert (plain - expected).abs().max() > 0.05 * plain.abs().max()  # else nothing is shown
    check_supported(model)


@torch.no_grad()
def test_rows_that_never_become_logits_are_left_out(tiny_model: TinyModel) -> None:
    model = tiny_model(unpadded_vocab_size=300)  # Inkling's field
    assert vocabulary_size(model) == 300
    assert lm_logits(model, torch.zeros(2, 32)).shape == (2, 300)


class _Doubled(LlamaForCausalLM):
    """A head of unknown code, as it comes with a model."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = 2 * output.logits
        return output


def test_a_head_that_does_more_is_refused_by_name(tiny_model: TinyModel) -> None:
    model = _Doubled(tiny_model().config).eval()
    calls: list[int] = []
    hook = decoder(model).register_forward_pre_hook(lambda *_: calls.append(1))
    for _ in range(2):
        with pytest.raises(SkdError, match="`llama` model: it does more with its decoder's states") as caught:
            check_supported(model)
    assert caught.value.where == "_Doubled"
    assert calls == []  # forwards are counted by such hooks, and these are not the caller's
    hook.remove()


def test_a_supported_model_is_run_once_and_left_as_it_was(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model().train()
    model.model.norm.eval()
    check_supported(model)
    assert model.training
    assert not model.model.norm.training
    monkeypatch.setattr(model, "forward", None)
    check_supported(model)


def test_a_model_that_sees_tokens_to_come_is_refused(tiny_model: TinyModel) -> None:
    model = tiny_model(seed=1)
    attention = model.model.layers[0].self_attn

    def forward(hidden_states: torch.Tensor, **_: Any) -> tuple[torch.Tensor, None]:
        return hidden_states.flip(1), None

    attention.forward = forward
    with pytest.raises(SkdError, match="`llama` model: it is not causal: its logits depend on tokens to come"):
        check_supported(model)


NO_DECODERS: dict[str, tuple[dict[str, Any], str]] = {
    "llama4_text": (SHAPE | {"num_local_experts": 2, "intermediate_size_mlp": 32}, "has a `get_decoder"),
    "modernbert-decoder": (SHAPE, "has a `get_decoder"),
    "bert": (SHAPE, "is not causal"),
    "xlm-roberta": (SHAPE, "is not causal"),
    "big_bird": (SHAPE, "is not causal"),
}


@pytest.mark.parametrize("arch", NO_DECODERS)
def test_what_is_no_causal_decoder_is_refused_by_name_without_weights(arch: str) -> None:
    options, reason = NO_DECODERS[arch]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(arch, **options))
    with pytest.raises(SkdError, match=f"`{arch}` model: it {reason}"):
        check_supported(model)


@pytest.mark.parametrize("arch", ["gpt_neox_japanese", "gpt_neox", "bart", "mamba", "gpt2"])
def test_decoders_of_other_kinds_are_supported(arch: str) -> None:
    options = {**SHAPE, "max_position_embeddings": 64, "d_model": 32, "decoder_layers": 1, "decoder_ffn_dim": 32}
    options |= {"n_embd": 32, "n_layer": 1, "n_head": 4, "decoder_attention_heads": 4, "state_size": 4}
    check_supported(other_model(arch, options))
