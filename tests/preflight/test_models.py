"""Model folders, adapters and contexts that cannot be used, before anything is trained."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, MambaConfig, PreTrainedTokenizerFast

from skd_lib.config import RunConfig, TaskConfig
from skd_lib.errors import SkdError
from skd_lib.evaluation.generate import generate
from skd_lib.models.files import load_tokenizer
from skd_lib.models.loading import load_model
from skd_lib.preflight.checks import Checks
from skd_lib.preflight.models import check_adapters, check_model
from tests.conftest import SaveTinyModel, TinyModel
from tests.preflight.support import check, edit_json, only


@pytest.fixture
def models(copies: tuple[Path, Path]) -> tuple[Path, Path]:
    """The models of these tests' runs, which are changed."""
    return copies


def config(values: dict[str, Any]) -> RunConfig:
    return RunConfig.model_validate(values)


def nan(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.self_attn.q_proj.weight"][5, 3] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def no_causal_decoder(arch: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        config = AutoConfig.for_model(
            arch,
            hidden_size=32,
            intermediate_size=64,
            intermediate_size_mlp=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            vocab_size=320,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        )
        if arch == "llama4_text":
            config.num_local_experts = 2
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)

    return spoil


SPOILT: dict[str, tuple[Callable[[Path], Any], str]] = {
    "more layers": (lambda folder: edit_json(folder / "config.json", num_hidden_layers=8), "missing from the files"),
    "fewer layers": (lambda folder: edit_json(folder / "config.json", num_hidden_layers=1), "but not in the model"),
    "wider": (lambda folder: edit_json(folder / "config.json", hidden_size=64), "of another shape"),
    "vocabulary": (lambda folder: edit_json(folder / "config.json", vocab_size=100), "of another shape"),
    "awq": (
        lambda folder: edit_json(folder / "config.json", quantization_config={"quant_method": "awq", "bits": 4}),
        r"quantised \(awq\), and they are not",
    ),
    "gemma": (lambda folder: edit_json(folder / "config.json", model_type="gemma"), "model_type `gemma`"),
    "a list": (lambda folder: (folder / "config.json").write_text("[]"), r"cannot read its config\.json"),
    "a word": (
        lambda folder: edit_json(folder / "config.json", num_hidden_layers="four"),
        r"cannot read its config\.json",
    ),
    "heads": (lambda folder: edit_json(folder / "config.json", num_attention_heads=5), r"cannot read its config\.json"),
    "dtype": (lambda folder: edit_json(folder / "config.json", dtype="float3"), r"cannot read its config\.json"),
    "activation": (lambda folder: edit_json(folder / "config.json", hidden_act="nope"), "not a causal language model"),
    "nan": (nan, r"1 weights are not finite .*: model\.layers\.1\.self_attn\.q_proj\.weight"),
    "generation": (
        lambda folder: (folder / "generation_config.json").write_text('{"eos_token'),
        r"cannot read its generation_config\.json",
    ),
    "tokenizer": (lambda folder: (folder / "tokenizer.json").write_text("{}"), "cannot load the tokenizer"),
    "adapter": (lambda folder: (folder / "adapter_config.json").write_text("{}"), "a model and an adapter"),
    "bert": (no_causal_decoder("bert"), "`bert` model: it is not causal"),
    "llama4": (no_causal_decoder("llama4_text"), "`llama4_text` model: it has a `get_decoder"),
    "modernbert": (no_causal_decoder("modernbert-decoder"), "`modernbert-decoder` model: it has a `get_decoder"),
    "t5": (lambda folder: edit_json(folder / "config.json", model_type="t5"), "`t5` model: it is an encoder-decoder"),
}


@pytest.mark.parametrize("case", SPOILT)
def test_a_model_folder_that_is_no_model(case: str, values: dict[str, Any], models: tuple[Path, Path]) -> None:
    spoil, match = SPOILT[case]
    spoil(models[0])
    checks = Checks()
    assert checks.attempt("teacher", lambda: check_model(checks, "teacher", str(models[0]), config(values))) is None
    (found,) = checks.found
    with pytest.raises(SkdError, match=match):
        raise SkdError(found.what)
    assert (found.name, found.level) == ("teacher", "error")
    assert found.where
    assert found.hint


def test_a_name_that_is_too_long_for_a_file_system(values: dict[str, Any], tmp_path: Path) -> None:
    found = only(check(values | {"teacher": "x" * 300}, tmp_path), "error")
    assert found.name == "teacher"
    assert found.what in ("no such folder, and not a hub id", "File name too long")


@pytest.mark.parametrize(
    ("section", "lora", "where", "match"),
    [
        ("distill", {"target_modules": ["nope"]}, "target_modules", "no layer `nope`"),
        ("distill", {"target_modules": ["q_proj", "lm_head"]}, "target_modules", "are one tensor"),
        ("teacher_sft", {"target_modules": ["embed_tokens"]}, "target_modules", "are one tensor"),
        ("student_init", {"target_modules": ["q_prj"]}, "target_modules", "no layer `q_prj`"),
        ("distill", {"rank": 4000}, "rank", "beyond that of every layer"),
    ],
)
def test_adapters_that_cannot_be(
    section: str, lora: dict[str, Any], where: str, match: str, values: dict[str, Any]
) -> None:
    values[section] = {"training": {"lora": {"rank": 4, **lora}}}
    if section == "student_init":
        values[section]["mode"] = "sft"
    checks = Checks()
    models = [check_model(Checks(), role, values[role], config(values)) for role in ("teacher", "student")]
    opened = [model for model in models if model is not None]
    check_adapters(checks, config(values), opened)
    if section == "distill":  # a student that is cut from its teacher has its layers
        del values["student"]
        cut = {"mode": "prune", "keep_first": 1, "keep_last": 1}
        check_adapters(checks, config(values | {"student_init": cut}), opened[:1])
    for found in checks.found:
        assert (found.name, found.where, found.level) == (section, f"{section}.training.lora.{where}", "error")
        assert match in found.what
        assert found.hint
    assert len(checks.found) == 1 + (section == "distill")


def test_adapters_that_can_be(
    values: dict[str, Any], tmp_path: Path, models: tuple[Path, Path], save_tiny_model: SaveTinyModel
) -> None:
    save_tiny_model(models[1], tie_word_embeddings=False)
    values["distill"] = {"training": {"lora": {"rank": 4, "target_modules": ["q_proj", "lm_head"]}}}
    assert check(values, tmp_path).errors() == []
    edit_json(models[1] / "config.json", tie_word_embeddings=True)  # the head is its own, whatever the config says
    assert check(values, tmp_path).errors() == []


def test_layers_that_peft_refuses(values: dict[str, Any], models: tuple[Path, Path]) -> None:
    config_of_mamba = MambaConfig(vocab_size=320, hidden_size=32, num_hidden_layers=1, state_size=4, eos_token_id=2)
    AutoModelForCausalLM.from_config(config_of_mamba).save_pretrained(models[1])
    values["distill"] = {"training": {"lora": {"rank": 2}}}
    student = check_model(Checks(), "student", values["student"], config(values))
    assert student is not None
    checks = Checks()
    check_adapters(checks, config(values), [student])
    (found,) = checks.found
    assert (found.name, found.level) == ("distill", "error")
    assert "incompatible with Mamba-based models" in found.what
    values["distill"]["training"]["lora"]["target_modules"] = ["in_proj"]
    check_adapters(checks, config(values), [student])
    assert checks.found == [found]


def answers(folder: Path) -> None:
    """It runs, with rows of different lengths."""
    task = TaskConfig(max_new_tokens=3, max_prompt_tokens=64)
    generate(load_model(folder, device="cpu"), load_tokenizer(folder), ["a", "a longer one"], task, batch_size=2)


def test_nothing_is_refused_for_rows_of_random_weights(values: dict[str, Any], tmp_path: Path) -> None:
    """The good pair that the others are made from."""
    report = check(values, tmp_path)
    assert [found for found in report.checks if found.level != "ok"] == []


def test_a_model_of_several_modalities_is_compared(
    tmp_path: Path, values: dict[str, Any], tiny_tokenizer: PreTrainedTokenizerFast, tiny_model: TinyModel
) -> None:
    text = tiny_model("gemma3").config.to_dict()
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 16, "patch_size": 8}
    config = AutoConfig.for_model("gemma3", text_config=text, vision_config=vision, mm_tokens_per_image=1)
    with torch.random.fork_rng(devices=[]):
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "vlm")
    tiny_tokenizer.save_pretrained(tmp_path / "vlm")
    report = check(values | {"teacher": str(tmp_path / "vlm"), "student": str(tmp_path / "vlm")}, tmp_path)
    assert report.errors() == []
    load_model(tmp_path / "vlm", device="cpu")
    weights = load_file(tmp_path / "vlm" / "model.safetensors")
    dropped = next(name for name in weights if "vision" in name)
    save_file(
        {k: v for k, v in weights.items() if k != dropped}, tmp_path / "vlm" / "model.safetensors", {"format": "pt"}
    )
    report = check(values | {"teacher": str(tmp_path / "vlm")}, tmp_path)
    assert "1 missing from the files" in only(report, "error").what


@pytest.mark.parametrize(
    ("method", "cut", "words", "level"),
    [
        ("skd", 0, 70, "error"),
        ("on_policy", 0, 70, "error"),
        ("seqkd", 0, 70, "error"),
        ("on_policy", 1, 70, "error"),
        ("supervised_kd", 0, 70, "ok"),
        ("skd", 0, 4, "ok"),
    ],
)
def test_rows_that_reach_where_rotary_positions_stretch(
    method: str, cut: int, words: int, level: str, values: dict[str, Any], models: tuple[Path, Path], tmp_path: Path
) -> None:
    stretching = models[0] if cut or method == "seqkd" else models[1]
    stretch = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "original_max_position_embeddings": 128}
    edit_json(stretching / "config.json", rope_parameters={"rope_type": "longrope", "rope_theta": 1e4, **stretch})
    rows = [{"source": f"file {i}", "target": f"the file {i}"} for i in range(40)]
    train, test = tmp_path / "train.jsonl", tmp_path / "test.jsonl"
    train.write_text("".join(json.dumps(row | {"source": row["source"] + " le" * words}) + "\n" for row in rows[:20]))
    test.write_text("".join(json.dumps(row) + "\n" for row in rows[20:]))
    values["data"]["source"] |= {"train": [str(train)], "test": [str(test)]}
    values["task"] |= {"max_prompt_tokens": 300, "max_new_tokens": 28}
    values["distill"] = {"method": method, "sampling": {"gamma": 5}}
    if cut:
        values |= {"student": None, "student_init": {"mode": "prune", "keep_first": 1, "keep_last": 1}}
    found = [each for each in check(values, tmp_path).checks if "rotary" in each.what]
    if level == "ok":
        assert not found
    else:
        assert [each.level for each in found] == ["error"]
        assert "train.jsonl" in found[0].where
        assert "max_prompt_tokens to " in found[0].hint


def test_code_that_comes_with_a_model_is_not_what_trains(
    values: dict[str, Any], models: tuple[Path, Path], tmp_path: Path
) -> None:
    (models[1] / "modeling_own.py").write_text("raise RuntimeError('it is run')\n")
    edit_json(models[1] / "config.json", auto_map={"AutoModelForCausalLM": "modeling_own.Own"})
    values["trust_remote_code"] = True
    found = only(check(values, tmp_path), "warning")
    assert (found.name, "modeling_own.py) is not run" in found.what) == ("student", True)
