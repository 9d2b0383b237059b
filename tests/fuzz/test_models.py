"""Model folders: what preflight accepts is loaded by the steps, and its logits are numbers."""

from __future__ import annotations

import copy
import json
import math
import os
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from skd_lib.config import RunConfig
from skd_lib.data.examples import make_example
from skd_lib.data.tokenize import answer_end_id, encode_prompt
from skd_lib.evaluation.generate import generate
from skd_lib.models.files import load_tokenizer
from skd_lib.models.vocabulary import eos_ids, pad_id
from skd_lib.preflight.checks import Checks
from skd_lib.preflight.data import check_reach
from skd_lib.preflight.models import check_model
from skd_lib.steps.trained_model import load_trainable
from tests.conftest import SaveTinyModel
from tests.fuzz.conftest import accepted, bounded, fuzz

FILES = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"]
CONFIG = ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"]
CONFIG += [
    "intermediate_size",
    "model_type",
    "architectures",
    "tie_word_embeddings",
    "max_position_embeddings",
    "dtype",
]
CONFIG += ["rope_parameters", "eos_token_id", "pad_token_id", "rms_norm_eps", "hidden_act", "quantization_config"]
CONFIG += [
    "attention_dropout",
    "auto_map",
    "use_cache",
    "mlp_bias",
    "attention_bias",
    "text_config",
    "initializer_range",
]
OTHER = {
    "generation_config.json": ["eos_token_id", "pad_token_id", "temperature", "do_sample", "max_length"],
    "tokenizer_config.json": [
        "chat_template",
        "eos_token",
        "pad_token",
        "bos_token",
        "tokenizer_class",
        "extra_special_tokens",
    ],
    "tokenizer.json": ["model", "added_tokens", "post_processor", "decoder", "pre_tokenizer", "normalizer", "version"],
}
VALUES: list[Any] = [None, True, False, 0, 1, 2, 3, 4, 8, 16, 32, 64, 319, 320, 321, -1, 2**31, 1e-300, 0.5, 1e308]
VALUES += [
    math.nan,
    math.inf,
    "",
    "four",
    "llama",
    "gemma",
    "bert",
    "mistral",
    "LlamaForCausalLM",
    "float3",
    "bfloat16",
]
VALUES += [[], {}, [1], [0, 2], [320], ["<s>"], {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}]
VALUES += [{"rope_type": "linear"}, {"quant_method": "awq"}, "<|im_end|>", "silu", "gelu", "<none>", {"a": {"b": []}}]
TEMPLATES = [
    "",
    "{{ x",
    "{% for m in messages %}{{ m.content }}{% endfor %}",
    "{{ messages[0].content }}",
    "{{ 1 / 0 }}",
]
TEMPLATES += [
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{{ messages }}",
    "fixed",
]
TEMPLATES += [
    "{% for m in messages %}<|im_start|>{{ m.role }}{{ m.content }}<|im_end|>{% endfor %}",
    "{{ raise_exception('no') }}",
]
SNIPPETS = [
    b"",
    b"\x00" * 8,
    b"\xff" * 8,
    b"{",
    b"}",
    b'"',
    b"null",
    b"version https://git-lfs",
    b"[" * 2000,
    b"NaN",
    b",",
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, save_tiny_model: SaveTinyModel) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("base") / "model", layers=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def copied(base: Path, folder: Path) -> Path:
    """Copy the model by links; a test that changes a file replaces the link."""
    model = folder / "model"
    shutil.rmtree(model, ignore_errors=True)
    shutil.copytree(base, model, copy_function=os.link)
    return model


def write(path: Path, content: bytes) -> None:
    path.unlink(missing_ok=True)  # not into the file that is linked
    path.write_bytes(content)


Change = tuple[str, str, Any]
_FIELDS = st.one_of(
    st.tuples(st.just("config.json"), st.sampled_from(CONFIG), st.sampled_from(VALUES)),
    *(st.tuples(st.just(file), st.sampled_from(names), st.sampled_from(VALUES)) for file, names in OTHER.items()),
    st.tuples(st.just("tokenizer_config.json"), st.just("chat_template"), st.sampled_from(TEMPLATES)),
    st.tuples(st.just("chat_template.jinja"), st.just(""), st.sampled_from(TEMPLATES)),
)


@pytest.mark.slow
@fuzz(110)
@given(changes=st.lists(_FIELDS, min_size=1, max_size=2))
@example(changes=[("tokenizer_config.json", "eos_token", "")])
@example(changes=[("config.json", "architectures", 64)])
def test_fields(base: Path, folder: Path, changes: list[Change]) -> None:
    model = copied(base, folder)
    for file, name, value in changes:
        if file == "chat_template.jinja":
            write(model / file, str(value).encode())
            continue
        values = json.loads((model / file).read_text(encoding="utf-8"))
        if value == "<none>":
            values.pop(name, None)
        else:
            values[name] = copy.deepcopy(value)
        write(model / file, json.dumps(values).encode())
    check(model)


@fuzz(70)
@given(
    file=st.sampled_from(FILES),
    place=st.floats(0, 1),
    how=st.sampled_from(["put", "over", "end", "gone", "folder", "empty"]),
    snippet=st.sampled_from(SNIPPETS),
)
def test_bytes(base: Path, folder: Path, file: str, place: float, how: str, snippet: bytes) -> None:
    model = copied(base, folder)
    path = model / file
    content = path.read_bytes()
    at = int(place * len(content))
    path.unlink()
    match how:
        case "put":
            path.write_bytes(content[:at] + snippet + content[at:])
        case "over":
            path.write_bytes(content[:at] + snippet + content[at + len(snippet) :])
        case "end":
            path.write_bytes(content[:at])
        case "empty":
            path.touch()
        case "folder":
            path.mkdir()
    check(model)


TENSORS = ["model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight", "model.norm.weight", "lm_head.weight"]


@fuzz(50)
@given(
    tensor=st.sampled_from(TENSORS),
    how=st.sampled_from(["drop", "rename", "shape", "dtype", "offsets", "nan", "inf", "metadata", "more"]),
    value=st.sampled_from([0, 1, -1, 7, 2**40, "F64", "I8", "BOOL", None]),
)
def test_weights(base: Path, folder: Path, tensor: str, how: str, value: Any) -> None:
    model = copied(base, folder)
    path = model / "model.safetensors"
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header, data = json.loads(content[8 : 8 + length]), bytearray(content[8 + length :])
    entry = header.get(tensor, header["model.norm.weight"])
    match how:
        case "drop":
            header.pop(tensor, None)
        case "rename":
            header[f"{tensor}.other"] = header.pop(tensor, entry)
        case "shape":
            entry["shape"] = [value, *entry["shape"][1:]]
        case "dtype":
            entry["dtype"] = value
        case "offsets":
            entry["data_offsets"] = [value, entry["data_offsets"][1]]
        case "nan" | "inf":
            start, _ = entry["data_offsets"]
            data[start : start + 4] = struct.pack("<f", math.nan if how == "nan" else math.inf)
        case "metadata":
            header["__metadata__"] = value
        case "more":
            header["model.more.weight"] = dict(entry)
    text = json.dumps(header).encode()
    write(path, struct.pack("<Q", len(text)) + text + bytes(data))
    check(model)


def check(model: Path) -> None:
    values = {
        "name": "tiny",
        "teacher": str(model),
        "student": str(model),
        "data": {"source": {"type": "files", "train": ["rows.jsonl"]}},
        "task": {"prompt": "translate: {source}", "max_prompt_tokens": 96, "max_new_tokens": 4},
    }
    config = RunConfig.model_validate(values)
    checks = Checks()
    with bounded():
        found = check_model(checks, "teacher", str(model), config)
        if found is not None:  # ids without a row are a matter of the data
            check_reach(checks, found, config.task, [make_example("the file", "le fichier", "row 1")])
    errors = [check for check in checks.found if check.level == "error"]
    for error in errors:
        assert "this is a bug" not in error.what, error
        assert error.what.strip()
    if errors or found is None:
        assert errors, "a model that cannot be used, and no reason"
        return
    # As the steps do it.
    with bounded():
        tokenizer = load_tokenizer(model)
        end = answer_end_id(tokenizer, config.task)
        assert isinstance(end, int)
        assert eos_ids(model, tokenizer)
        assert pad_id(tokenizer) >= 0
        loaded = load_trainable(model)
        ids = torch.tensor([encode_prompt(tokenizer, config.task, "the file")])
        with torch.no_grad():
            assert loaded(input_ids=ids).logits.isfinite().all()
        assert len(generate(loaded, tokenizer, ["the file"], config.task, batch_size=1)) == 1


def test_the_model_that_nothing_was_done_to_is_accepted(base: Path, folder: Path) -> None:
    """Else nothing would be tested."""
    model = copied(base, folder)
    assert accepted(lambda: load_trainable(model)) is not None
    check(model)
