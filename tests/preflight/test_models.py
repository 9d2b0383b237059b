"""What preflight finds wrong with model folders, adapters and vocabularies, before anything is trained."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, MambaConfig, PreTrainedTokenizerFast

from skd_lib.config import RunConfig, TaskConfig
from skd_lib.errors import SkdError
from skd_lib.evaluation.generate import generate
from skd_lib.models.files import load_tokenizer
from skd_lib.models.loading import load_model, save_model
from skd_lib.models.special_ids import eos_ids, pad_id, take_over_ends
from skd_lib.models.vocabulary import check_compatible, compare
from skd_lib.preflight import Check, PreflightReport, run_checks
from skd_lib.preflight.checks import Checks
from skd_lib.preflight.models import check_adapters, check_model
from tests.conftest import SaveTinyModel, TinyModel

ROWS = [{"source": f"le fichier {i} et {i * i}", "target": f"the file {i} and {i * i}"} for i in range(40)]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory, save_tiny_model: SaveTinyModel) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("models")
    return save_tiny_model(root / "teacher", layers=3), save_tiny_model(root / "student", seed=1)


@pytest.fixture
def models(tmp_path: Path, good: tuple[Path, Path]) -> tuple[Path, Path]:
    """Copies, to be spoilt."""
    teacher, student = (Path(shutil.copytree(path, tmp_path / path.name)) for path in good)
    return teacher, student


@pytest.fixture
def values(tmp_path: Path, models: tuple[Path, Path]) -> dict[str, Any]:
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    return {
        "name": "tiny",
        "teacher": str(models[0]),
        "student": str(models[1]),
        "data": {"source": {"type": "files", "train": [str(data)]}},
        "task": {"prompt": "translate: {source}", "max_prompt_tokens": 96, "max_new_tokens": 64},
    }


def config(values: dict[str, Any]) -> RunConfig:
    return RunConfig.model_validate(values)


def check(values: dict[str, Any], tmp_path: Path) -> PreflightReport:
    return run_checks(config(values), checkpoint_root=str(tmp_path / "checkpoints"), tracking_uri="")


def only(report: PreflightReport, level: str) -> Check:
    (found,) = [found for found in report.checks if found.level == level]
    return found


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


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


# --- adapters -----------------------------------------------------------------------------------------------------


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


# --- vocabularies -------------------------------------------------------------------------------------------------


def with_tokens(folder: Path, *tokens: str, pad: str | None = None) -> Path:
    tokenizer = load_tokenizer(folder)
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in tokens])
    if pad is not None:
        tokenizer.add_special_tokens({"pad_token": pad})
    tokenizer.save_pretrained(folder)
    return folder


def pair(tmp_path: Path, save: SaveTinyModel, teacher: int, student: int) -> tuple[Path, Path]:
    return save(tmp_path / "a", vocab_size=teacher), save(tmp_path / "b", seed=1, vocab_size=student)


def answers(folder: Path) -> None:
    """It runs, with rows of different lengths."""
    task = TaskConfig(max_new_tokens=3, max_prompt_tokens=64)
    generate(load_model(folder, device="cpu"), load_tokenizer(folder), ["a", "a longer one"], task, batch_size=2)


PAIRS = {
    "added padding, teacher padded": (
        384,
        384,
        [],
        [],
        "[PAD]",
        "the tokenizers differ in 1 of 321 ids: 320 is unused",
    ),
    "added padding, teacher not padded": (320, 321, [], [], "[PAD]", ""),
    "a surplus id of the student": (384, 320, ["<image>"], ["<image>"], None, "1 ids that its model has no row for"),
    "a surplus id of both": (320, 320, ["<image>"], ["<image>"], None, "1 ids that its model has no row for"),
    "padding beyond the rows": (320, 320, [], [], "[PAD]", "1 ids that its model has no row for"),
}


@pytest.mark.parametrize("case", PAIRS)
def test_ids_that_no_text_makes_are_a_warning_and_run(
    case: str, values: dict[str, Any], tmp_path: Path, save_tiny_model: SaveTinyModel
) -> None:
    teacher_rows, student_rows, teacher_tokens, student_tokens, pad, warning = PAIRS[case]
    teacher, student = pair(tmp_path, save_tiny_model, teacher_rows, student_rows)
    with_tokens(teacher, *teacher_tokens)
    with_tokens(student, *student_tokens, pad=pad)
    assert check_compatible(teacher, student) == []
    report = check(values | {"teacher": str(teacher), "student": str(student)}, tmp_path)
    assert report.errors() == []
    warned = [found.what for found in report.checks if found.level == "warning"]
    assert bool(warned) == bool(warning)
    assert all(warning in found for found in warned)
    answers(student)
    assert pad_id(load_tokenizer(student), min(teacher_rows, student_rows)) < min(teacher_rows, student_rows)

    # A row that spells the token out, however far down, is an error: it would be an id without a row, or without sense.
    token = pad or "<image>"
    late = [*ROWS, *({"source": f"un {i}", "target": f"one {i} {i}"} for i in range(300)), {"source": f"x {token}"}]
    late[-1]["target"] = "y"
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in late), encoding="utf-8")
    errors = check(values | {"teacher": str(teacher), "student": str(student)}, tmp_path).errors()
    assert errors
    assert all(f"the token {token!r}" in error.what and "row 341" in error.where for error in errors)
    if min(teacher_rows, student_rows) == student_rows == 320:
        with pytest.raises(SkdError, match="has the token id 320, and the model has 320 rows"):
            generate(load_model(student, device="cpu"), load_tokenizer(student), [token], TaskConfig(), batch_size=1)


def test_a_teachers_tokens_beyond_its_rows_are_found_where_the_student_is_cut(
    values: dict[str, Any], tmp_path: Path, models: tuple[Path, Path], save_tiny_model: SaveTinyModel
) -> None:
    values |= {"student_init": {"mode": "prune", "keep_first": 1, "keep_last": 1}}
    del values["student"]
    with_tokens(models[0], "<late>")
    assert only(check(values, tmp_path), "warning").name == "teacher"
    rows = [*ROWS * 6, {"source": "un <late> mot", "target": "one word"}]
    unique = [{"source": f"{row['source']} {i}", "target": f"{row['target']} {i}"} for i, row in enumerate(rows)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in unique), encoding="utf-8")
    errors = check(values, tmp_path).errors()
    assert ["row 241" in error.where for error in errors] == [True]
    save_tiny_model(models[0], layers=3, vocab_size=310)  # ordinary tokens, which any text may make
    found = only(check(values, tmp_path), "error")
    assert "the teacher's tokenizer has 10 ids that its model has no row for (vocab_size 310): 310" in found.what


def test_a_template_that_prints_a_token_without_a_row(
    values: dict[str, Any], tmp_path: Path, models: tuple[Path, Path]
) -> None:
    for folder in models:
        with_tokens(folder, "<image>")
        tokenizer = load_tokenizer(folder)
        assert isinstance(tokenizer.chat_template, str)
        tokenizer.chat_template = "<image>" + tokenizer.chat_template
        tokenizer.save_pretrained(folder)
    errors = check(values, tmp_path).errors()
    assert {error.what.partition(",")[0] for error in errors} == {
        "its prompt or answer has the token '<image>' (id 320)"
    }


@pytest.mark.parametrize("what", ["pre_tokenizer", "post_processor", "normalizer"])
def test_tokenizers_that_cut_texts_in_different_ways(
    what: str, values: dict[str, Any], models: tuple[Path, Path], tmp_path: Path
) -> None:
    other = {
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "post_processor": None,
        "normalizer": {"type": "Replace", "pattern": {"String": "e"}, "content": "a"},
    }
    edit_json(models[1] / "tokenizer.json", **{what: other[what]})
    found = only(check(values, tmp_path), "warning")
    assert found.name == "tokenizers"
    assert "cut the same text in different ways" in found.what


def test_special_ids_that_are_none(values: dict[str, Any], models: tuple[Path, Path], tmp_path: Path) -> None:
    edit_json(models[0] / "generation_config.json", pad_token_id=-1)
    assert check(values, tmp_path).errors() == []
    edit_json(models[0] / "config.json", eos_token_id=-1)
    errors = check(values, tmp_path).errors()
    assert errors
    assert all(error.what.startswith("eos_token_id of config.json: ") for error in errors)


def test_an_ordinary_token_of_one_tokenizer_is_an_error(
    values: dict[str, Any], tmp_path: Path, save_tiny_model: SaveTinyModel
) -> None:
    teacher, student = pair(tmp_path, save_tiny_model, 384, 384)
    state = json.loads((student / "tokenizer.json").read_text())
    state["model"]["vocab"]["zzz"] = 320
    (student / "tokenizer.json").write_text(json.dumps(state))
    (error,) = check_compatible(teacher, student)
    assert "320 is unused for the teacher, 'zzz' for the student" in error.what
    assert (
        only(check(values | {"teacher": str(teacher), "student": str(student)}, tmp_path), "error").what == error.what
    )


def test_a_student_takes_over_where_its_teacher_ends(
    values: dict[str, Any],
    tmp_path: Path,
    models: tuple[Path, Path],
    tiny_tokenizer: PreTrainedTokenizerFast,
    caplog: pytest.LogCaptureFixture,
) -> None:
    teacher, student = models
    GenerationConfig(eos_token_id=[2, 3]).save_pretrained(teacher)
    found = only(check(values, tmp_path), "warning")
    assert found.name == "tokenizers"
    assert "end-of-sequence ids: [2, 3] for the teacher, [2] for the student" in found.what
    with caplog.at_level("WARNING"):
        assert check_compatible(teacher, student) == []
    assert "different end-of-sequence ids" in caplog.text
    model = load_model(student, device="cpu")
    take_over_ends(model, tiny_tokenizer, teacher)
    assert eos_ids(model, tiny_tokenizer) == (2, 3)
    save_model(model, tiny_tokenizer, tmp_path / "saved")
    assert eos_ids(tmp_path / "saved", tiny_tokenizer) == (2, 3)
    assert compare(teacher, tmp_path / "saved").warnings == []


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
