from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from skd_lib.errors import SkdError
from skd_lib.models.files import check_model_folder, describe, load_tokenizer, weights_digest
from skd_lib.models.loading import load_model, save_model
from skd_lib.models.special_ids import eos_ids, pad_id
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
