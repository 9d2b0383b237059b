from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BloomConfig,
    GenerationConfig,
    MixtralConfig,
    PreTrainedTokenizerFast,
)

from skd_lib.errors import SkdError
from skd_lib.models import skeleton as skeleton_module
from skd_lib.models.files import check_model_folder, describe, load_tokenizer, weights_digest
from skd_lib.models.loading import load_model, save_model
from skd_lib.models.references import resolve_model
from skd_lib.models.skeleton import check_finite, check_weights, skeleton
from skd_lib.models.vocabulary import eos_ids, pad_id
from tests.conftest import CONFIGS, SaveTinyModel, TinyModel


@pytest.fixture
def saved(tmp_path: Path, save_tiny_model: SaveTinyModel) -> Path:
    return save_tiny_model(tmp_path / "model")


@pytest.mark.parametrize("arch", sorted(CONFIGS))
def test_round_trip(arch: str, tmp_path: Path, tiny_model: TinyModel, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny_model(arch, seed=1)
    save_model(model, tiny_tokenizer, tmp_path / "model", card="# card")
    loaded = load_model(tmp_path / "model", device="cpu")
    assert not loaded.training
    assert loaded.config._attn_implementation == ("eager" if arch == "gemma2" else "sdpa")
    ids = torch.randint(0, 320, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits)
    assert load_tokenizer(tmp_path / "model").get_vocab() == tiny_tokenizer.get_vocab()
    assert (tmp_path / "model" / "README.md").read_text() == "# card"
    # and by transformers alone, as a user of the result would
    AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert AutoTokenizer.from_pretrained(tmp_path / "model").chat_template == tiny_tokenizer.chat_template


def test_dtype_and_default_device(saved: Path) -> None:
    model = load_model(saved, dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert model.device.type == ("cuda" if torch.cuda.is_available() else "cpu")


def test_attention_does_without_cudnn(saved: Path) -> None:
    torch.backends.cuda.enable_cudnn_sdp(True)
    load_model(saved, device="cpu")
    assert not torch.backends.cuda.cudnn_sdp_enabled()


def test_sampling_defaults_are_neither_saved_nor_loaded(
    tmp_path: Path, saved: Path, tiny_model: TinyModel, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    hub_defaults = GenerationConfig(
        do_sample=True,
        temperature=0.6,
        top_k=50,
        top_p=0.9,
        repetition_penalty=1.1,
        eos_token_id=[2, 3],
        pad_token_id=0,
    )
    model = tiny_model()
    model.generation_config = hub_defaults
    save_model(model, tiny_tokenizer, tmp_path / "ours")
    written = json.loads((tmp_path / "ours" / "generation_config.json").read_text())
    assert written["eos_token_id"] == [2, 3]
    assert not {"temperature", "top_k", "top_p", "repetition_penalty", "do_sample"} & set(written)
    assert model.generation_config is hub_defaults  # the caller's model is left as it was

    hub_defaults.save_pretrained(saved)
    loaded = load_model(saved).generation_config
    assert loaded.eos_token_id == [2, 3]
    assert (loaded.temperature, loaded.top_k, loaded.top_p, loaded.repetition_penalty) == (None, None, None, None)


def test_saving_replaces_a_folder_as_a_whole(
    tmp_path: Path, tiny_model: TinyModel, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "old").touch()
    save_model(tiny_model(), tiny_tokenizer, tmp_path / "model")
    assert not (tmp_path / "model" / "old").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    modes = {path.stat().st_mode for path in (tmp_path / "model").iterdir()}
    assert len(modes) == 1  # safetensors alone would make the weights private


def test_missing_and_unexpected_weights_are_errors(saved: Path) -> None:
    file = saved / "model.safetensors"
    weights = load_file(file)
    weights["model.layers.7.mlp.up_proj.weight"] = weights.pop("model.layers.1.mlp.up_proj.weight")
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(SkdError) as caught:
        load_model(saved)
    assert "1 missing from the files: model.layers.1.mlp.up_proj.weight" in caught.value.what
    assert "1 in the files but not in the model: model.layers.7.mlp.up_proj.weight" in caught.value.what


def test_weights_of_another_shape_are_errors(saved: Path) -> None:
    file = saved / "model.safetensors"
    weights = load_file(file)
    weights["model.norm.weight"] = torch.ones(7)
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(SkdError, match=r"of another shape than the model's: model\.norm\.weight"):
        load_model(saved)


def test_folder_problems(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(SkdError, match="no such folder"):
        check_model_folder(tmp_path / "nowhere")
    weights = saved / "model.safetensors"
    content = weights.read_bytes()

    weights.write_bytes(content[:-100])
    with pytest.raises(SkdError, match="cut off"):
        check_model_folder(saved)
    weights.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(SkdError, match="git-lfs"):
        check_model_folder(saved)
    weights.rename(saved / "pytorch_model.bin")
    with pytest.raises(SkdError, match=r"pickle files \(pytorch_model.bin\)") as caught:
        load_model(saved)
    assert "safetensors" in caught.value.hint
    (saved / "pytorch_model.bin").unlink()
    with pytest.raises(SkdError, match=r"no \*\.safetensors weights"):
        check_model_folder(saved)
    check_model_folder(saved, weights=False)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (saved / name).unlink()
    with pytest.raises(SkdError, match="no tokenizer"):
        check_model_folder(saved, weights=False)
    (saved / "config.json").unlink()
    with pytest.raises(SkdError, match=r"no config\.json"):
        check_model_folder(saved)


def test_broken_files_are_named(saved: Path) -> None:
    (saved / "tokenizer.json").write_text("{")
    with pytest.raises(SkdError, match="cannot load the tokenizer"):
        load_tokenizer(saved)
    (saved / "config.json").write_text('{"model_type": "no-such-model"}')
    with pytest.raises(SkdError, match=r"cannot read its config\.json"):
        load_model(saved)


def test_digest_is_of_the_weights_not_of_the_files(
    tmp_path: Path, saved: Path, tiny_model: TinyModel, save_tiny_model: SaveTinyModel
) -> None:
    digest = weights_digest(saved)
    shards = tmp_path / "shards"
    tiny_model().save_pretrained(shards, max_shard_size="20KB")
    assert len(list(shards.glob("*.safetensors"))) > 1
    assert weights_digest(shards) == digest

    changed = shutil.copytree(saved, tmp_path / "changed")
    weights = load_file(changed / "model.safetensors")
    save_file(weights, changed / "model.safetensors", metadata={"format": "pt", "note": "another header"})
    assert weights_digest(changed) == digest
    weights["model.norm.weight"][3] += 1e-6
    save_file(weights, changed / "model.safetensors", metadata={"format": "pt"})
    assert weights_digest(changed) != digest
    assert weights_digest(save_tiny_model(tmp_path / "other", seed=1)) != digest


@pytest.mark.parametrize(
    "index", ["[]", '{"weight_map": [1]}', '{"weight_map": {"a": 5}}', '{"weight_map": {"a": "../x"}}']
)
def test_an_index_that_is_none(saved: Path, index: str) -> None:
    (saved / "model.safetensors").rename(saved / "a.safetensors")
    (saved / "model.safetensors.index.json").write_text(index)
    with pytest.raises(SkdError, match="not an index of safetensors files"):
        check_model_folder(saved)


def test_missing_shard_is_named(tmp_path: Path, tiny_model: TinyModel) -> None:
    tiny_model().save_pretrained(tmp_path, max_shard_size="20KB")
    first = min(tmp_path.glob("*.safetensors"))
    first.unlink()
    with pytest.raises(SkdError, match=f"1 of .* weight files are missing, e.g. {first.name}"):
        weights_digest(tmp_path)


def test_describe(saved: Path, tiny_model: TinyModel) -> None:
    assert describe(saved) == {
        "num_parameters": sum(weight.numel() for weight in tiny_model().parameters()),
        "vocab_size": 320,
        "context_length": 512,
    }


def test_eos_ids_are_gathered_from_everywhere(
    saved: Path, tiny_model: TinyModel, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    model = tiny_model(eos_token_id=[5, 6])
    model.generation_config = GenerationConfig(eos_token_id=[3, 2])
    assert eos_ids(model, tiny_tokenizer) == (2, 3, 5, 6)  # the tokenizer's first
    GenerationConfig(eos_token_id=[3, 2]).save_pretrained(saved)
    assert eos_ids(saved, tiny_tokenizer) == (2, 3)
    (saved / "generation_config.json").unlink()
    assert eos_ids(saved, tiny_tokenizer) == (2,)


def test_no_eos_at_all_is_an_error(tiny_model: TinyModel, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny_model(eos_token_id=None)
    model.generation_config = GenerationConfig()
    bare = PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer.backend_tokenizer)
    with pytest.raises(SkdError, match="end-of-sequence"):
        eos_ids(model, bare)
    with pytest.raises(SkdError, match="padding"):
        pad_id(bare)


def test_pad_id_falls_back_to_eos(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    assert pad_id(tiny_tokenizer) == 0
    unpadded = PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer.backend_tokenizer, eos_token="<|im_end|>")
    assert pad_id(unpadded) == 2


# --- whatever is wrong with a folder: a sentence, and the same before and while it is loaded -------------------------


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_weights(folder: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def look_at(folder: Path) -> str:
    check_model_folder(folder)
    return check_weights(folder, skeleton(folder))


def refused(folder: Path, match: str) -> None:
    """By a look at the files, and by loading them."""
    with pytest.raises(SkdError, match=match):
        look_at(folder)
    with pytest.raises(SkdError, match=match):
        load_model(folder, device="cpu")


WRONG_CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "more layers": ({"num_hidden_layers": 3}, r"9 missing from the files: model\.layers\.2"),
    "fewer layers": ({"num_hidden_layers": 1}, r"9 in the files but not in the model: model\.layers\.1"),
    "wider": ({"hidden_size": 64}, "of another shape than the model's"),
    "vocabulary": ({"vocab_size": 100}, r"of another shape than the model's: model\.embed_tokens\.weight"),
    "no head": ({"tie_word_embeddings": False}, r"1 missing from the files: lm_head\.weight"),
    "another type": ({"model_type": "gemma"}, "names the architecture LlamaForCausalLM, and its model_type `gemma`"),
    "nan": ({"rms_norm_eps": float("nan")}, r"its config\.json has NaN for rms_norm_eps"),
    "an encoder": ({"model_type": "t5"}, "`t5` model: it is an encoder-decoder"),
    "a word for a number": ({"num_hidden_layers": "four"}, r"cannot read its config\.json"),
    "heads": ({"num_attention_heads": 5}, r"cannot read its config\.json"),
    "dtype": ({"dtype": "float3"}, r"cannot read its config\.json"),
}


@pytest.mark.parametrize("case", WRONG_CONFIGS)
def test_a_config_that_is_not_the_weights(saved: Path, case: str) -> None:
    changes, match = WRONG_CONFIGS[case]
    edit_config(saved, **changes)
    refused(saved, match)


@pytest.mark.parametrize("text", ["[1, 2]", "null", "", "{", '{"model_type": 5}', "[" * 10_000])
def test_a_config_that_is_none(saved: Path, text: str) -> None:
    (saved / "config.json").write_text(text)
    refused(saved, r"cannot read its config\.json")


def test_configs_that_would_take_forever(saved: Path) -> None:
    edit_config(saved, num_hidden_layers=10**9)
    with pytest.raises(SkdError, match="names 1000000000 layers"):
        skeleton(saved)


def test_a_config_that_says_quantised(saved: Path) -> None:
    edit_config(saved, quantization_config={"quant_method": "awq", "bits": 4})
    with pytest.raises(SkdError, match=r"says that the weights are quantised \(awq\), and they are not"):
        check_weights(saved, skeleton(saved))
    with pytest.raises(SkdError):
        load_model(saved, device="cpu")


def test_integers_are_no_weights(saved: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    edit_weights(saved, lambda weights: weights.update({name: (weights[name] * 100).to(torch.int8)}))
    refused(saved, f"stored as integers, and config.json does not say how they are quantised: {name}")


def test_a_weight_that_is_there_twice(saved: Path) -> None:
    edit_weights(saved, lambda weights: weights.update({"norm.weight": torch.zeros(32)}))
    refused(saved, r"twice, with and without `model\.`: norm\.weight")
    edit_weights(saved, lambda weights: weights.pop("norm.weight"))
    load_model(saved, device="cpu")
    shard = {"model.norm.weight": torch.zeros(32)}
    (saved / "model.safetensors").rename(saved / "a.safetensors")
    save_file(shard, saved / "b.safetensors", metadata={"format": "pt"})
    names = dict.fromkeys(load_file(saved / "a.safetensors"), "a.safetensors") | {"other": "b.safetensors"}
    (saved / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    refused(saved, r"1 tensors are in more than one weight file, e.g. model\.norm\.weight")


def test_experts_that_transformers_fuses_are_compared(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    config = MixtralConfig(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        bos_token_id=1,
        eos_token_id=2,
    )
    save_model(AutoModelForCausalLM.from_config(config), tiny_tokenizer, tmp_path / "model")
    assert "experts.3.w1" in " ".join(load_file(tmp_path / "model" / "model.safetensors"))  # one by one in the file
    assert check_weights(tmp_path / "model", skeleton(tmp_path / "model")) == ""
    edit_config(tmp_path / "model", num_local_experts=5)
    refused(tmp_path / "model", r"of another shape than the model's: model\.layers\.0\.mlp\.experts")


@pytest.mark.parametrize("arch", sorted(CONFIGS))
def test_good_models_are_compared_and_pass(arch: str, tmp_path: Path, save_tiny_model: SaveTinyModel) -> None:
    for tied in (True, False):
        folder = save_tiny_model(tmp_path / str(tied), arch, tie_word_embeddings=tied)
        assert check_weights(folder, skeleton(folder)) == ""
        check_finite(folder)


def test_masks_that_old_versions_saved_are_no_weights(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    config = AutoConfig.for_model("gpt2", vocab_size=320, n_embd=32, n_layer=1, n_head=4, eos_token_id=2)
    save_model(AutoModelForCausalLM.from_config(config), tiny_tokenizer, tmp_path / "gpt2")
    file = tmp_path / "gpt2" / "model.safetensors"
    masks = {
        "transformer.h.0.attn.bias": torch.ones(1, 1, 8, 8),
        "transformer.h.0.attn.masked_bias": torch.tensor(-1e4),
    }
    save_file({**load_file(file), **masks}, file, metadata={"format": "pt"})
    assert check_weights(tmp_path / "gpt2", skeleton(tmp_path / "gpt2")) == ""
    load_model(tmp_path / "gpt2")


def test_attention_that_the_architecture_or_the_machine_has_not(
    saved: Path, tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    config = BloomConfig(vocab_size=320, hidden_size=32, n_layer=2, n_head=4, eos_token_id=2)
    save_model(AutoModelForCausalLM.from_config(config), tiny_tokenizer, tmp_path / "bloom")
    assert load_model(tmp_path / "bloom").config._attn_implementation == "eager"
    for field in ("attn_implementation", "_attn_implementation"):
        edit_config(saved, **{field: "flash_attention_2"})
        assert check_weights(saved, skeleton(saved)) == ""
        assert load_model(saved).config._attn_implementation == "sdpa"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite(
    saved: Path, dtype: torch.dtype, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    def edit(weights: dict[str, torch.Tensor]) -> None:
        for name in weights:
            weights[name] = weights[name].to(dtype)
        weights["model.layers.1.mlp.up_proj.weight"][-1] = value
        weights["masked_bias"] = torch.tensor(value)  # no weight, and no row of one

    edit_weights(saved, edit)
    for whole in (1 << 27, 1 << 10):  # a larger model is looked at in places, its last rows among them
        monkeypatch.setattr(skeleton_module, "WHOLE", whole)
        with pytest.raises(SkdError, match=r"1 weights are not finite .*: model\.layers\.1\.mlp\.up_proj\.weight"):
            check_finite(saved)
    check_finite(saved, [r"mlp\.up_proj"])


def test_an_adapter_in_the_folder_is_never_applied(saved: Path, tmp_path: Path) -> None:
    (saved / "adapter_config.json").write_text('{"base_model_name_or_path": "x"}')
    refused(saved, r"a model and an adapter \(adapter_config\.json\)")
    with pytest.raises(SkdError, match="a model and an adapter") as caught:
        check_model_folder(saved, weights=False)
    assert "if the adapter is merged into the weights already, remove its files" in caught.value.hint
    (saved / "adapter_config.json").rename(saved / "adapter_model.safetensors")
    with pytest.raises(SkdError, match=r"a model and an adapter \(adapter_model\.safetensors\)"):
        resolve_model(str(saved))
    only = tmp_path / "only"
    only.mkdir()
    (saved / "adapter_model.safetensors").rename(only / "adapter_model.safetensors")
    load_model(saved, device="cpu")
    with pytest.raises(SkdError, match=r"holds an adapter .*, not a model") as caught:
        check_model_folder(only)
    assert "merge_and_unload" in caught.value.hint


def test_a_head_of_its_own_is_kept_whatever_the_config_says(
    tmp_path: Path, tiny_model: TinyModel, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    model, ids = tiny_model(tie_word_embeddings=False), torch.arange(4, 20).reshape(2, 8)
    save_model(model, tiny_tokenizer, tmp_path / "model")
    edit_config(tmp_path / "model", tie_word_embeddings=True)
    assert check_weights(tmp_path / "model", skeleton(tmp_path / "model")) == ""
    assert describe(tmp_path / "model")["num_parameters"] == sum(weight.numel() for weight in model.parameters())
    loaded = load_model(tmp_path / "model", device="cpu")
    assert loaded.config.tie_word_embeddings is False
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)
    # A tied model whose head is stored as well is tied.
    tied = tiny_model()
    save_file(
        {name: tensor.clone() for name, tensor in tied.state_dict().items()},
        tmp_path / "model" / "model.safetensors",
        metadata={"format": "pt"},
    )
    assert describe(tmp_path / "model")["num_parameters"] == sum(weight.numel() for weight in tied.parameters())
    assert load_model(tmp_path / "model", device="cpu").config.tie_word_embeddings is True


GENERATION = ["", "{", "[]", '{"eos_token_id": "two"}', '{"eos_token_id": [2, null]}', '{"eos_token_id": -1}']


@pytest.mark.parametrize("text", GENERATION)
def test_a_generation_config_that_is_broken(saved: Path, text: str) -> None:
    (saved / "generation_config.json").write_text(text)
    for look in (lambda: load_model(saved), lambda: eos_ids(saved, load_tokenizer(saved))):
        with pytest.raises(SkdError, match=r"cannot read its generation_config\.json"):
            look()


def test_a_file_that_cannot_be_read_is_named(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(self: Path, *_: Any, **__: Any) -> Any:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "open", denied)
    with pytest.raises(SkdError, match=r"model\.safetensors cannot be read: Permission denied"):
        check_model_folder(saved)


@pytest.mark.parametrize("header", ["[]", "{}x", '{"a": 5}', '{"a": {"dtype": "F32", "shape": 3}}', "[" * 5_000])
def test_headers_that_are_none(saved: Path, header: str) -> None:
    text = header.encode()
    (saved / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(SkdError, match="safetensors"):
        check_model_folder(saved)


def test_an_architecture_that_is_not_supported_is_refused_when_it_is_loaded(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    config = AutoConfig.for_model(
        "bert",
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=320,
        eos_token_id=2,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    refused(tmp_path, "`bert` model: it is not causal")
