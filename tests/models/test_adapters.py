"""Where adapters may be put, and that a model with merged ones computes what it did with them beside its weights."""

from __future__ import annotations

import warnings
from typing import Any

import peft
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from skd_lib.config import LoraConfig
from skd_lib.errors import SkdError
from skd_lib.models.adapters import add_lora, check_lora, merge_lora, merged_weights
from tests.conftest import TinyModel

pytestmark = pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`", "ignore:Model with `tie_word")


def on_meta(model: PreTrainedModel) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(model.config)  # type: ignore[no-any-return]


def disturbed(wrapped: Any) -> Any:
    """Adapters as after training: PEFT's first ones change nothing."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        for name, weight in wrapped.named_parameters():
            if "lora_" in name:
                weight.normal_(0, 0.3)
    return wrapped


@pytest.mark.parametrize("targets", [["lm_head"], ["q_proj", "lm_head"], ["embed_tokens"], ["model.embed_tokens"]])
@pytest.mark.parametrize("meta", [False, True])
def test_what_embedding_and_head_share_gets_no_adapter(tiny_model: TinyModel, targets: list[str], meta: bool) -> None:
    model = tiny_model(tie_word_embeddings=True)
    model = on_meta(model) if meta else model
    with pytest.raises(SkdError, match="are one tensor") as caught:
        check_lora(model, LoraConfig(rank=4, target_modules=targets))
    assert caught.value.where == "training.lora.target_modules"


@pytest.mark.parametrize(
    "targets", [[], ["q_proj"], ["lm_head"], ["embed_tokens", "down_proj"], ["layers.1.mlp.up_proj"]]
)
def test_a_merged_model_computes_what_it_did_with_adapters(tiny_model: TinyModel, targets: list[str]) -> None:
    model = tiny_model(tie_word_embeddings=False)
    ids = torch.arange(4, 24).reshape(2, 10)
    with torch.no_grad():
        bare = model(ids).logits
        wrapped = disturbed(add_lora(model, LoraConfig(rank=4, target_modules=targets), seed=0)).eval()
        adapted = wrapped(ids).logits
        merge_lora(wrapped)
        merged = model(ids).logits
    assert (adapted - bare).abs().max() > 0.1 * bare.abs().max()
    torch.testing.assert_close(merged, adapted, rtol=1e-3, atol=1e-3)
    assert all(weight.requires_grad for weight in model.parameters())


def test_a_merge_into_a_weight_that_is_shared_is_an_error(tiny_model: TinyModel) -> None:
    """Whoever put the adapters there."""
    for target in ("lm_head", "embed_tokens"):
        config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=[target])
        wrapped = disturbed(peft.get_peft_model(tiny_model(tie_word_embeddings=True), config))
        with pytest.raises(SkdError, match="computes other logits"):
            merge_lora(wrapped)


@pytest.mark.parametrize(
    ("targets", "message", "hint"),
    [
        (["nope"], "no layer `nope`", "down_proj"),
        (["q_proj", "k_prj"], "no layer `k_prj`", "k_proj"),
        (["proj"], "no layer `proj`", "q_proj"),
        (["mlp"], "`mlp` is no linear layer, model.layers.0.mlp is a LlamaMLP", "up_proj"),
        (["norm"], "`norm` is no linear layer", "o_proj"),
        ([""], "no layer ``", "q_proj"),
    ],
)
def test_names_that_are_of_no_linear_layer(tiny_model: TinyModel, targets: list[str], message: str, hint: str) -> None:
    with pytest.raises(SkdError, match=message) as caught:
        check_lora(on_meta(tiny_model()), LoraConfig(rank=4, target_modules=targets))
    assert hint in caught.value.hint


def test_a_rank_beyond_every_layers(tiny_model: TinyModel) -> None:
    model = on_meta(tiny_model())
    check_lora(model, LoraConfig(rank=32))
    for settings in (LoraConfig(rank=33), LoraConfig(rank=17, target_modules=["k_proj", "v_proj"])):
        with pytest.raises(SkdError, match="beyond that of every layer") as caught:
            check_lora(model, settings)
        assert caught.value.where == "training.lora.rank"


def test_gpt2s_layers_take_adapters() -> None:
    config = AutoConfig.for_model("gpt2", n_embd=32, n_layer=1, n_head=4, vocab_size=48, bos_token_id=1, eos_token_id=2)
    model = AutoModelForCausalLM.from_config(config).eval()
    with warnings.catch_warnings(action="ignore"):
        wrapped = disturbed(add_lora(model, LoraConfig(rank=4, target_modules=["c_attn"]), seed=0))
    merge_lora(wrapped)
    with pytest.raises(SkdError, match="no layer `q_proj`") as caught:
        check_lora(model, LoraConfig(rank=4, target_modules=["q_proj"]))
    assert "c_attn" in caught.value.hint


def test_a_lookup_of_its_own_takes_no_adapter() -> None:
    config = AutoConfig.for_model("opt", vocab_size=320, hidden_size=32, ffn_dim=64, word_embed_proj_dim=32)
    config.num_hidden_layers, config.num_attention_heads = 1, 4
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(SkdError, match=r"`embed_positions` is no linear layer, .* is a OPTLearnedPositionalEmbedding"):
        check_lora(model, LoraConfig(rank=4, target_modules=["embed_positions"]))


@pytest.mark.parametrize("modules_to_save", [None, ["lm_head"]])
def test_merged_weights_are_those_of_the_merged_model(tiny_model: TinyModel, modules_to_save: list[str] | None) -> None:
    """By the names and to the rounding of the model without adapters, which itself stays as it is."""
    model = tiny_model(tie_word_embeddings=False)
    config = peft.LoraConfig(
        r=4, lora_alpha=12, target_modules=["q_proj", "down_proj"], modules_to_save=modules_to_save
    )
    original = {name: tensor.clone() for name, tensor in model.named_parameters()}
    wrapped = disturbed(peft.get_peft_model(model, config))
    before = {name: tensor.clone() for name, tensor in wrapped.state_dict().items()}
    found = {name: tensor.clone() for name, tensor in merged_weights(model)}
    assert all(torch.equal(tensor, before[name]) for name, tensor in wrapped.state_dict().items())
    merged = dict(wrapped.merge_and_unload().named_parameters())
    assert set(found) == set(merged) == set(original)
    for name, tensor in merged.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6)
    assert not torch.equal(
        found["model.layers.0.mlp.down_proj.weight"], original["model.layers.0.mlp.down_proj.weight"]
    )


def test_adapters_that_are_no_plain_sum_are_refused(tiny_model: TinyModel) -> None:
    for options in ({"use_dora": True}, {"lora_bias": True, "bias": "none"}):
        model = tiny_model(arch="qwen2")
        peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj"], **options))
        with pytest.raises(SkdError, match=r"q_proj with its adapter is not W \+ BA"):
            dict(merged_weights(model))
    model = tiny_model()
    peft.get_peft_model(model, peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]))
    with pytest.raises(SkdError, match="not W"):
        dict(merged_weights(model))


@pytest.mark.parametrize(
    ("options", "layer"),
    [
        ({"target_modules": ["lm_head"]}, "lm_head"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "model.embed_tokens"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, "lm_head"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}, "model.embed_tokens"),
    ],
)
def test_a_shared_weight_that_is_trained_in_one_place_is_refused(
    tiny_model: TinyModel, options: dict[str, Any], layer: str
) -> None:
    """The other layer would be sent in its place, or the layer's adapter would be lost."""
    model = tiny_model(tie_word_embeddings=True)
    peft.get_peft_model(model, peft.LoraConfig(r=4, task_type="CAUSAL_LM", **options))
    with pytest.raises(SkdError, match=f"{layer} is trained apart from a weight that model.embed_tokens and lm_head"):
        dict(merged_weights(model))


def test_a_tied_model_with_other_adapters_is_merged(tiny_model: TinyModel) -> None:
    model = tiny_model(tie_word_embeddings=True)
    names = dict(model.named_parameters()).keys()
    peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    assert dict(merged_weights(model)).keys() == names


def test_a_model_without_adapters_keeps_its_names(tiny_model: TinyModel) -> None:
    model = tiny_model(tie_word_embeddings=True)
    assert dict(merged_weights(model)).keys() == dict(model.named_parameters()).keys()
